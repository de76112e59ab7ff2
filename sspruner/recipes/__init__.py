"""Recipes: all settings that decide a cut, and none about the machine, as frozen dataclasses and YAML files.

The command line's options are generated from their fields: the text under a field is its help.
"""
