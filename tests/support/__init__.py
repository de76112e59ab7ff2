"""What tests share: tiny models, oracles, helpers. Test modules import this, never each other."""
