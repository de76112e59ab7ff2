"""Measures what a cut costs."""
