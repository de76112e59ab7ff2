"""Where two answers are as good, the larger count and the first units are taken."""

from __future__ import annotations

import torch

from sspruner.budgets.allocate import allocate
from sspruner.budgets.budget import ResolvedBudget
from sspruner.budgets.decide import select
from sspruner.graph.group import DependencyGroup


def layers(*units: int) -> dict[str, DependencyGroup]:
    """Layers of so many units each, on one axis."""
    return {f"layers.{i}:state": DependencyGroup(f"layers.{i}", "state", 1, n, ()) for i, n in enumerate(units)}


def test_of_two_uniform_counts_as_near_the_larger_is_kept():
    assert allocate(layers(7), ResolvedBudget(0.5)) == {"layers.0:state": 4}
    assert allocate(layers(8), ResolvedBudget(0.375, multiple_of=2)) == {"layers.0:state": 6}


def test_of_two_global_allocations_as_near_the_larger_is_taken():
    scores = {"layers.0:state": torch.ones(1, 4), "layers.1:state": torch.full((1, 4), 2.0)}
    found = allocate(layers(4, 4), ResolvedBudget(0.375, allocation="global", multiple_of=2), scores)
    assert found == {"layers.0:state": 2, "layers.1:state": 4}  # 6 of 8, where 5 were asked for


def test_of_equal_units_the_first_stay():
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    assert select(scores, 2).keep == ((1, 2), (0, 1))
