"""An example plugin for sspruner."""
