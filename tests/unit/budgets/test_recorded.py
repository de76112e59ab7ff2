"""A budget records all that was asked for, and nothing else."""

from __future__ import annotations

import pytest

from sspruner.budgets.budget import ResolvedBudget

ALWAYS = {"allocation": "uniform", "multiple_of": 1}


@pytest.mark.parametrize(
    "asked",
    [
        {"sparsity": 0.5},
        {"sparsity": {"state": 0.5, "head": 0.25}},
        {"keep": 4, "multiple_of": 2},
        {"sparsity": 0.5, "ratios": {"layers.0.*": 0.25}},
        {"sparsity": 0.5, "ignore": ["layers.0.*"]},
        {"sparsity": 0.5, "pattern": "2:4", "rows": ["B"]},
        {"sparsity": 0.5, "granularity": "row"},
        {"sparsity": 0.5, "allocation": "global", "normalise": "energy"},
        {"sparsity": 0.5, "floor": {"*": 2}, "cap": {"*": 6}},
    ],
)
def test_what_was_asked_is_recorded(asked: dict):
    assert ResolvedBudget(**asked).to_json() == ALWAYS | asked
