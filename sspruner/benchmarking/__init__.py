"""Speed and memory at decode and prefill, and their theoretical ceiling."""
