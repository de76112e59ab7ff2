"""Measure what a model can do, and what a cut costs."""
