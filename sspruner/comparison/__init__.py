"""Comparison: several scorers and sparsities on the same text."""
