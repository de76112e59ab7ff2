"""Evaluation: measure a model's quality, and the damage of a cut."""
