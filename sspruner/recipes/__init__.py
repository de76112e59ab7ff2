"""Recipes: everything that decides a cut and nothing about the machine, as frozen dataclasses that are also YAML.

The command line's options are made from their fields: the text under a field is its help.
"""
