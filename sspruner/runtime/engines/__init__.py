"""Scripts that `sspruner bench --engine` runs in an engine's own environment. They import the engine alone."""
