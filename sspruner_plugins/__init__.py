"""The scorers that ship. Each is one file, registered by entry point like a third party's; the engine knows none."""
