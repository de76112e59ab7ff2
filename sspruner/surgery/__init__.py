"""Applies a plan as a mask or as a slice, and proves that the two are equal."""
