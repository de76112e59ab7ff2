"""Checkpoint formats and the rules of the runtimes that read them."""
