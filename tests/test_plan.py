"""Plans: budgets, selection, JSON, and what is refused."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import plans, selections, tiny_model

import sspruner
from sspruner.planning.allocate import allocate, select
from sspruner.planning.plan import Plan, Selection, check_plan

GRAPH = sspruner.trace(tiny_model(layers=3, groups=2, state=8))
NAMES = list(GRAPH.groups)


def scores(importance: torch.Tensor) -> sspruner.Scores:
    return sspruner.Scores(dict.fromkeys(NAMES, importance))


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 12), st.integers(1, 64))
def test_uniform_keeps_the_nearest_allowed_count(sparsity: float, multiple_of: int, units: int) -> None:
    graph = sspruner.trace(tiny_model(layers=1, state=units))
    (count,) = allocate(graph.on_axis("state"), sparsity=sparsity, keep=None, multiple_of=multiple_of).values()
    allowed = [n for n in range(1, units + 1) if n % multiple_of == 0 or n == units]
    assert count in allowed
    assert abs(count - units * (1 - sparsity)) == min(abs(n - units * (1 - sparsity)) for n in allowed)


@given(st.data())
def test_select_keeps_the_best_of_every_set(data: st.DataObject) -> None:
    importance = torch.tensor(data.draw(st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=1)))
    count = data.draw(st.integers(1, 5))
    selection = select(importance.float(), count)
    for row, keep, group in zip(importance.tolist(), selection.keep, range(len(importance)), strict=True):
        assert list(keep) == sorted(set(keep))
        assert len(keep) == count
        lost = [row[i] for i in selection.dropped(group)]
        assert not lost or min(row[i] for i in keep) >= max(lost)
        assert sorted([*keep, *selection.dropped(group)]) == list(range(5))


@given(st.data())
def test_json_round_trip(data: st.DataObject) -> None:
    plan = data.draw(plans(GRAPH))
    with tempfile.TemporaryDirectory() as folder:
        plan.save(path := Path(folder) / "plan.json")
        assert Plan.load(path) == plan
        assert len(path.read_text().splitlines()) >= len(plan.groups)  # a line per group: diffable


@given(st.data())
def test_then_is_indexing_twice(data: st.DataObject) -> None:
    first = data.draw(selections(2, 9))
    second = data.draw(selections(2, first.after))
    units = torch.arange(9)
    for both, one, two in zip(first.then(second).keep, first.keep, second.keep, strict=True):
        assert torch.equal(units[list(both)], units[list(one)][list(two)])


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"sparsity": 1.0}, "sparsity 1: must be at least 0 and below 1"),
        ({"sparsity": -0.1}, "sparsity -0.1"),
        ({"sparsity": float("nan")}, "sparsity nan"),
        ({"keep": 9}, "keep 9: .* has only 8 units"),
        ({"keep": 0}, "keep 0: must be at least 1"),
        ({"keep": 5, "multiple_of": 4}, "keep 5: not a multiple of 4; nearest: 4 or 8"),
        ({"sparsity": 0.5, "multiple_of": 0}, "multiple-of 0"),
        ({"sparsity": 0.5, "keep": 4}, "either sparsity .* or keep"),
        ({}, "either sparsity .* or keep"),
        ({"sparsity": 0.5, "allocation": "best"}, "unknown allocation 'best'; known: uniform"),
    ],
)
def test_impossible_budgets(budget: dict, message: str) -> None:
    with pytest.raises(sspruner.InputError, match=message):
        sspruner.plan(GRAPH, scores(torch.rand(2, 8)), **budget)


def test_scores_of_another_shape() -> None:
    with pytest.raises(sspruner.PlanError, match=r"scores of shape \(2, 7\) do not fit this model"):
        sspruner.plan(GRAPH, scores(torch.rand(2, 7)), sparsity=0.5)


WHOLE = tuple(range(8))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"backbone.layers.9.mixer:state": Selection(8, (WHOLE, WHOLE))}, "no such dependency group"),
        ({NAMES[0]: Selection(9, (WHOLE, WHOLE))}, "starts from 2 x 9 units, the model has 2 x 8"),
        ({NAMES[0]: Selection(8, (WHOLE,))}, "starts from 1 x 8 units"),
        ({NAMES[0]: Selection(8, ((0, 1), (0, 1, 2)))}, "every group needs the same count"),
        ({NAMES[0]: Selection(8, ((), ()))}, "every group needs the same count, at least 1"),
        ({NAMES[0]: Selection(8, ((0, 1), (3, 8)))}, "must increase within 0 to 7"),
        ({NAMES[0]: Selection(8, ((1, 0), (3, 4)))}, "must increase"),
        ({NAMES[0]: Selection(8, ((0, 0), (3, 4)))}, "must increase"),
        ({NAMES[0]: Selection(8, ((-1, 0), (3, 4)))}, "must increase"),
    ],
)
def test_plans_that_do_not_fit(groups: dict, message: str) -> None:
    with pytest.raises(sspruner.PlanError, match=message):
        check_plan(Plan("state", groups), GRAPH)


def test_a_plan_that_contradicts_its_groups() -> None:
    with pytest.raises(sspruner.PlanError, match="says that its axis is 'head'"):
        check_plan(Plan("head", {NAMES[0]: Selection(8, (WHOLE, WHOLE))}), GRAPH)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"version": 2}', '{"version": 1}', '{"version": 1, "axis": "state", "groups": []}',
     '{"version": 1, "axis": "state", "groups": {"a:state": {"before": "x", "keep": [[1]]}}}',
     '{"version": 1, "axis": "state", "groups": {"a:state": {"before": 4, "keep": [[1.5, true]]}}}',
     '{"version": 1, "axis": "state", "groups": {"a:state": {"before": 4, "keep": [1]}}}',
     '{"version": 1, "axis": "state", "groups": {"a:state": {"before": 4, "keep": [[5]]}}}',
     '{"version": 1, "axis": "state", "groups": {"a:state": {"before": 4, "keep": []}}}', "[" * 100_000],
)  # fmt: skip
def test_malformed_plan_files(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(sspruner.PlanError):
        Plan.load(tmp_path / "plan.json")


def test_a_plan_made_for_other_weights_is_refused() -> None:
    """Same shapes, other values: only the fingerprint can tell; a cast to bf16 does not change it."""
    made_for, other = tiny_model(seed=1), tiny_model(seed=2)
    plan = sspruner.plan(sspruner.trace(made_for), sspruner.score(made_for, "magnitude"), sparsity=0.5)
    with pytest.raises(sspruner.PlanError, match="made for another model"):
        sspruner.apply(other, plan)
    sspruner.apply(made_for.bfloat16(), Plan.from_json(json.loads(json.dumps(plan.to_json()))))


def test_printing() -> None:
    plan = Plan("state", {NAMES[0]: Selection(8, ((0, 1), (0, 1)))})
    assert str(plan) == f"plan on axis 'state'\n  {NAMES[0]}  8 -> 2"
