"""After blocks went, a model says by their new names which parameters are shared."""

from __future__ import annotations

import pytest

from sspruner.graph.trace import trace
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Selection
from sspruner.surgery.apply import apply
from sspruner.testing import zoo


@pytest.mark.parametrize("family", ["zamba2", "zamba"])
def test_tied_names_are_those_of_the_blocks_that_stay(family: str):
    model = zoo(family, seed=0)
    (name, group), *_ = trace(model).on_axis("block").items()
    apply(model, Plan({name: Selection(group.units, (tuple(range(1, group.units)),))}))
    known: dict[int, str] = {}
    tied = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if (first := known.setdefault(id(parameter), path)) != path:
            tied[path] = first
    assert model._tied_weights_keys == tied
