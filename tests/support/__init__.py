"""Shared test code: tiny models, oracles, helpers. Test modules import this package, never each other."""
