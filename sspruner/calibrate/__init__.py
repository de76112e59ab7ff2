"""Text to batches, layer-by-layer replay, SSMView, exact state statistics."""
