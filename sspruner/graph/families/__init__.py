"""Built-in model families, one file each, registered through the same entry point as third-party families."""
