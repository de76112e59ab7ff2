"""Random dependency groups and scores for budget tests."""

from __future__ import annotations

import torch

from sspruner.graph.group import DependencyGroup

Scores = dict[str, torch.Tensor]


def unit_groups(*shapes: tuple[int, int], axis: str = "state", own: int = 1) -> dict[str, DependencyGroup]:
    return {f"l{i}:{axis}": DependencyGroup(f"l{i}", axis, *s, (), multiple_of=own) for i, s in enumerate(shapes)}


def random_scores(groups: dict[str, DependencyGroup], seed: int) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(g.groups, g.units, generator=generator) for n, g in groups.items()}
