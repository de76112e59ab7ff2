"""Built-in scorers, one file each, registered by entry point like third-party ones."""
