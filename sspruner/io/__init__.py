"""Load, save and export models.

Main names: `load.load`, `save.save`, `export.export`, `skeleton.skeleton`.
"""
