"""Hook signatures, the plugin manager and the scorer contract."""
