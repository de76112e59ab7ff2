"""Compare scorers and sparsities on the same text."""
