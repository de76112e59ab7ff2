"""Axes, members, dependency groups: what can be removed from a model. Knows tensors and modules, nothing else."""
