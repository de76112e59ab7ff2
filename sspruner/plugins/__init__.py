"""Plugins: hook signatures (`hookspecs`) and the manager that finds and loads plugins."""
