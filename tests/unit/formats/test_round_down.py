"""What is rounded for a target is still a cut: an axis that was to be cut never comes back whole."""

from __future__ import annotations

from sspruner.budgets.allocate import allocate
from sspruner.budgets.budget import ResolvedBudget
from sspruner.formats.rules import Rule
from sspruner.formats.targets import Fit, Target
from sspruner.graph.trace import trace
from sspruner.testing import zoo


def test_the_nearest_size_below_is_taken_where_the_whole_axis_is_nearer():
    graph = trace(zoo("mamba2", state=8))
    fours = Target("fours", ("mamba2",), "hf", (Rule("in fours", of="state", multiple=4),))
    kept = allocate(graph.on_axis("state"), ResolvedBudget(keep=7, fit=Fit(fours, graph)))
    assert set(kept.values()) == {4}  # 8 is nearer, and no cut
