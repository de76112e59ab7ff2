"""A config says a size where all layers have it, and its original value where they differ."""

from __future__ import annotations

from sspruner.graph.trace import trace
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Selection
from sspruner.surgery.apply import apply
from sspruner.testing import zoo


def cut_states(*kept: int):
    """A model with layers of 8 states, of which so many are kept."""
    model = zoo("mamba2", state=8)
    names = list(trace(model).on_axis("state").items())
    groups = {
        name: Selection(8, (tuple(range(n)),) * group.groups) for (name, group), n in zip(names, kept, strict=True)
    }
    return apply(model, Plan(groups))


def test_one_size_is_written_and_the_original_recorded():
    layers = len(trace(zoo("mamba2", state=8)).layers)
    config = cut_states(*[4] * layers).config
    assert config.state_size == 4
    assert config.sspruner["stock"]["state_size"] == 8


def test_of_different_sizes_none_is_written():
    layers = len(trace(zoo("mamba2", state=8)).layers)
    config = cut_states(2, *[4] * (layers - 1)).config
    assert config.state_size == 8
    assert "state_size" not in config.sspruner["stock"]


def test_a_second_cut_remembers_the_sizes_before_the_first():
    layers = len(trace(zoo("mamba2", state=8)).layers)
    model = cut_states(*[4] * layers)
    groups = trace(model).on_axis("state").items()
    apply(model, Plan({name: Selection(4, ((0, 1),) * group.groups) for name, group in groups}))
    assert model.config.state_size == 2
    assert model.config.sspruner["stock"]["state_size"] == 8
