"""Plans: budgets, patterns, selection, JSON, and what is refused."""

from __future__ import annotations

import json
import math
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner.budgets.allocate import allocate
from sspruner.budgets.budget import ResolvedBudget
from sspruner.budgets.decide import select
from sspruner.graph.group import Block, DependencyGroup
from sspruner.plans.plan import Plan, check_plan
from sspruner.plans.reduction import Selection
from support.family_plans import AXES
from support.tiny import everything, half, plans, tiny_model
from support.zoo import FAMILIES, zoo

GRAPH = sspruner.trace(tiny_model(layers=3, groups=2, heads_per_group=4, state=8))
STATES, HEADS = list(GRAPH.on_axis("state")), list(GRAPH.on_axis("head"))
BLOCK, HIDDEN = "backbone.layers:block", "backbone:hidden"
WHOLE = tuple(range(8))


def scores(importance: torch.Tensor) -> sspruner.Scores:
    return sspruner.Scores(dict.fromkeys(STATES, importance))


def random_scores(graph: sspruner.SSMGraph, *axes: str) -> sspruner.Scores:
    generator = torch.Generator().manual_seed(0)
    groups = {n: g for n, g in graph.groups.items() if g.axis in axes}
    return sspruner.Scores({n: torch.rand(g.groups, g.units, generator=generator) for n, g in groups.items()})


def group(units: int, own_multiple: int = 1) -> DependencyGroup:
    return DependencyGroup("layer", "state", 1, units, (), multiple_of=own_multiple)


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 12), st.sampled_from([1, 2, 8]), st.integers(1, 64))
def test_uniform_keeps_the_nearest_allowed_count(sparsity: float, multiple_of: int, own: int, units: int) -> None:
    """Of a multiple asked for and of the group's own one; what rounds to nothing or everything is refused, and the
    ratio that the message names can be met.
    """
    groups, step = {"layer:state": group(units, own)}, math.lcm(multiple_of, own)
    allowed = [n for n in range(1, units) if n % step == 0]
    target = units * (1 - sparsity)
    try:
        (count,) = allocate(groups, ResolvedBudget(sparsity, multiple_of=multiple_of)).values()
    except sspruner.InputError as error:
        refused = str(error)
    else:
        if sparsity == 0:
            assert count == units
        else:
            assert count in allowed
            assert abs(count - target) == min(abs(n - target) for n in [0, *allowed, units])
        return
    assert sparsity > 0
    assert all(min(target, units - target) < abs(n - target) or n + target == 2 * units for n in allowed)
    if not allowed:
        assert "it cannot be cut; leave it out with ignore" in refused
        return
    nearest = min(allowed, key=lambda n: (abs(n - target), -n))
    said = re.search(r"the nearest that can be met is (\S+) \(keeps (\d+)\)$", refused)
    assert said
    assert int(said[2]) == nearest
    assert allocate(groups, ResolvedBudget(float(said[1]), multiple_of=multiple_of)) == {"layer:state": nearest}


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


def test_several_axes_in_one_plan() -> None:
    """A fraction for each axis; an axis that is scored but not named is left alone."""
    scored = random_scores(GRAPH, "state", "head", "block")
    made = sspruner.plan(GRAPH, scored, sparsity={"state": 0.75, "head": 0.5})
    assert {n: (s.before, s.after) for n, s in made.groups.items()} == {
        **dict.fromkeys(STATES, (8, 2)),
        **dict.fromkeys(HEADS, (4, 2)),
    }
    assert set(made.axes) == {"state", "head"}
    assert made.made_by["sparsity"] == {"state": 0.75, "head": 0.5}
    for name, selection in made.groups.items():
        assert selection == select(scored.importance[name], selection.after)


def test_ratios_by_pattern_and_the_later_wins() -> None:
    """Full names, paths, ends of either and wildcards; 0 leaves a group alone; what no pattern means has the rest."""
    scored = random_scores(GRAPH, "state", "head")
    ratios = {
        "backbone.layers.*": 0.25,  # everything
        "*:head": 0.5,
        "layers.1.mixer:state": 0.75,
        "backbone.layers.2.mixer": 0.5,
        "layers.2.mixer:head": 0,
    }
    made = sspruner.plan(GRAPH, scored, sparsity={"state": 0.125}, ratios=ratios)
    assert {n.removeprefix("backbone.layers."): s.after for n, s in made.groups.items()} == {
        "0.mixer:state": 6, "0.mixer:head": 2,
        "1.mixer:state": 2, "1.mixer:head": 2,
        "2.mixer:state": 4,
    }  # fmt: skip
    turned = sspruner.plan(GRAPH, scored, sparsity=0.5, ratios=dict(reversed(ratios.items())))
    assert {s.after for n, s in turned.groups.items() if n in STATES} == {6}  # the wildcard came last
    assert {s.after for n, s in turned.groups.items() if n in HEADS} == {3}
    assert made.made_by["ratios"] == ratios


@pytest.mark.parametrize(
    ("ignore", "cut"),
    [
        (["layers.0.*"], STATES[1:]),
        (["backbone.layers.0.mixer"], STATES[1:]),
        (["layers.0.mixer:state", "*.2.mixer"], STATES[1:2]),
        (["layers.[12].*"], STATES[:1]),
        ([STATES[1]], [STATES[0], STATES[2]]),
    ],
)
def test_what_is_ignored_is_left_alone(ignore: list[str], cut: list[str]) -> None:
    made = sspruner.plan(GRAPH, scores(torch.rand(2, 8)), sparsity=0.5, ignore=ignore)
    assert list(made.groups) == cut
    assert made.made_by["ignore"] == ignore


def test_an_ignored_group_may_be_one_that_cannot_be_cut() -> None:
    groups = {"layer:state": group(8), "other:state": group(1)}
    with pytest.raises(sspruner.InputError, match="leave it out with ignore"):
        allocate(groups, ResolvedBudget(0.5))
    assert allocate(groups, ResolvedBudget(0.5, ignore=["other"])) == {"layer:state": 4, "other:state": 1}
    assert allocate(groups, ResolvedBudget(keep=4, ignore=["other"])) == {"layer:state": 4, "other:state": 1}


@pytest.mark.parametrize("ignore", [["layers.0.*"], ["layers.0"], ["backbone.layers.0"], ["layers.[0]"]])
def test_an_ignored_block_stays_however_bad_its_score(ignore: list[str]) -> None:
    scored = sspruner.Scores({BLOCK: torch.tensor([[-5.0, 3.0, 2.0]])})
    assert sspruner.plan(GRAPH, scored, keep=2).groups[BLOCK].keep == ((1, 2),)
    assert sspruner.plan(GRAPH, scored, keep=2, ignore=ignore).groups[BLOCK].keep == ((0, 1),)
    assert sspruner.plan(GRAPH, scored, keep=1, ignore=ignore).groups[BLOCK].keep == ((0,),)


def test_a_pattern_for_one_block_does_not_mean_the_tenth() -> None:
    blocks = tuple(Block(f"layers.{i}", ()) for i in range(12))
    groups = {"layers:block": DependencyGroup("layers", "block", 1, 12, (), blocks=blocks)}
    with pytest.raises(sspruner.InputError, match="keeping 2 units is less than the 3 that --ignore protects"):
        allocate(groups, ResolvedBudget(keep=2, ignore=["layers.1", "layers.2.*", "layers.11"]))
    assert allocate(groups, ResolvedBudget(keep=3, ignore=["layers.1", "layers.2.*", "layers.11"])) == {
        "layers:block": 3
    }
    with pytest.raises(sspruner.InputError, match="removes nothing"):
        sspruner.plan(GRAPH, sspruner.Scores({BLOCK: torch.rand(1, 3)}), keep=1, ignore=["layers.*"])


@pytest.mark.parametrize("kind", ["ignore", "ratios"])
@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("layers.1.mixer:stat", r"layers\.1\.mixer:state"),
        ("layers.2.mixr:state", r"layers\.2\.mixer:state"),
        ("layers.7.*", r"layers\.\d\.mixer:state"),
        ("ayers.0.*", r"layers\.0\.mixer:state"),  # an end starts at a dot
    ],
)
def test_a_pattern_that_matches_nothing_names_the_nearest(kind: str, pattern: str, nearest: str) -> None:
    given = [pattern] if kind == "ignore" else {pattern: 0.5}
    with pytest.raises(sspruner.InputError, match=f"matches nothing that is cut; the nearest name is {nearest}$"):
        sspruner.plan(GRAPH, scores(torch.rand(2, 8)), sparsity=0.5, **{kind: given})


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"sparsity": 1.0}, "sparsity 1: must be at least 0 and below 1"),
        ({"sparsity": -0.1}, "sparsity -0.1"),
        ({"sparsity": float("nan")}, "sparsity nan"),
        ({"sparsity": {"state": 1.5}}, "state: sparsity 1.5: must be at least 0 and below 1"),
        ({"sparsity": 0.5, "ratios": {"*:state": -1}}, r"\*:state: sparsity -1"),
        ({"keep": 9}, "keep 9: .* has only 8 units"),
        ({"keep": 0}, "keep 0: must be at least 1"),
        ({"keep": 5, "multiple_of": 4}, "keep 5: not a multiple of 4; nearest: 4 or 8"),
        ({"sparsity": 0.5, "multiple_of": 0}, "multiple-of 0"),
        ({"sparsity": 0.5, "keep": 4}, "either sparsity .* or keep"),
        ({}, "either sparsity .* or keep"),
        ({"sparsity": 0.5, "allocation": "best"}, "unknown allocation 'best'; known: uniform"),
        ({"sparsity": 0.05}, r"0\.mixer:state: 0\.05 removes nothing from 2 sets of 8 units; .*0\.125 \(keeps 7\)"),
        ({"sparsity": 0.95}, r"0\.mixer:state: 0\.95 removes everything from .*; .*0\.875 \(keeps 1\)"),
        ({"sparsity": 0.1, "multiple_of": 3}, r"removes nothing .* in multiples of 3; .*0\.25 \(keeps 6\)"),
        ({"sparsity": 0.5, "multiple_of": 9}, "in multiples of 9; it cannot be cut; leave it out with ignore"),
        ({"sparsity": 0.0}, "the budget removes nothing"),
        ({"sparsity": {"head": 0.5}}, "axis 'head': was not scored; there are scores for state"),
        ({"keep": 8}, "the budget removes nothing"),
        ({"sparsity": 0.5, "ignore": ["layers.*"]}, "the budget removes nothing"),
        ({"sparsity": 0.5, "ratios": {"*:state": 0}}, "the budget removes nothing"),
    ],
)
def test_impossible_budgets(budget: dict, message: str) -> None:
    with pytest.raises(sspruner.InputError, match=message):
        sspruner.plan(GRAPH, scores(torch.rand(2, 8)), **budget)


def test_experts_need_a_hidden_size_of_a_multiple_of_8() -> None:
    """Asked for or not; and what the user asks for is met as well. A plan that was made elsewhere is checked, too."""
    graph = sspruner.trace(zoo("granitemoehybrid"))  # 32 wide
    scored = random_scores(graph, "hidden")
    for sparsity, multiple_of, after in ((0.4, 1, 16), (0.3, 3, 24), (0.4, 16, 16)):
        made = sspruner.plan(graph, scored, sparsity=sparsity, multiple_of=multiple_of)
        assert made.groups["model:hidden"].after == after
    with pytest.raises(sspruner.InputError, match="keep 20: not a multiple of 8; nearest: 16 or 24"):
        sspruner.plan(graph, scored, keep=20)
    with pytest.raises(sspruner.InputError, match=r"0\.1 removes nothing .* in multiples of 8; .* 0\.25 \(keeps 24\)"):
        sspruner.plan(graph, scored, sparsity=0.1)
    twenty = Plan({"model:hidden": Selection(32, (tuple(range(20)),))})
    with pytest.raises(sspruner.PlanError, match="keeps 20 units; the model's code needs a multiple of 8"):
        check_plan(twenty, graph)
    check_plan(Plan({"model:hidden": Selection(32, (tuple(range(24)),))}), graph)


def test_scores_of_a_group_that_the_model_lacks() -> None:
    with pytest.raises(sspruner.PlanError, match=r"layers\.9\.mixer:state: scores of shape \(2, 8\) do not fit"):
        sspruner.plan(GRAPH, sspruner.Scores({"layers.9.mixer:state": torch.rand(2, 8)}), sparsity=0.5)


def test_scores_of_another_shape() -> None:
    with pytest.raises(sspruner.PlanError, match=r"scores of shape \(2, 7\) do not fit this model"):
        sspruner.plan(GRAPH, scores(torch.rand(2, 7)), sparsity=0.5)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"backbone.layers.9.mixer:state": Selection(8, (WHOLE, WHOLE))}, "no such dependency group"),
        ({"backbone.layers.1.mixer:stat": Selection(8, (WHOLE, WHOLE))}, f"the nearest is {STATES[1]}$"),
        ({STATES[0]: Selection(9, (WHOLE, WHOLE))}, "starts from 2 x 9 units, the model has 2 x 8"),
        ({STATES[0]: Selection(8, (WHOLE,))}, "starts from 1 x 8 units"),
        ({HEADS[0]: Selection(4, ((0, 1),))}, "starts from 1 x 4 units, the model has 2 x 4"),
        ({STATES[0]: Selection(8, ((0, 1), (0, 1, 2)))}, "every group needs the same count"),
        ({STATES[0]: Selection(8, ())}, "every group needs the same count"),
        ({HEADS[0]: Selection(4, ((0,), (0, 1)))}, r"keeps \[1, 2\] units; every group needs the same count"),
        ({STATES[0]: Selection(8, ((), ()))}, "keeps nothing; at least 1 unit has to stay"),
        ({BLOCK: Selection(3, ((),))}, "keeps nothing; at least 1 unit has to stay"),
        ({STATES[0]: Selection(8, ((0, 1), (3, 8)))}, "must increase within 0 to 7"),
        ({STATES[0]: Selection(8, ((1, 0), (3, 4)))}, "must increase"),
        ({STATES[0]: Selection(8, ((0, 0), (3, 4)))}, "must increase"),
        ({STATES[0]: Selection(8, ((-1, 0), (3, 4)))}, "must increase"),
        ({}, "keeps every unit: nothing would be removed"),
        ({STATES[0]: Selection(8, (WHOLE, WHOLE))}, "keeps every unit: nothing would be removed"),
        (everything(GRAPH).groups, "keeps every unit: nothing would be removed"),
    ],
)
def test_plans_that_do_not_fit(groups: dict, message: str) -> None:
    """Alone, and beside a cut on another axis that fits (where the fault is not that nothing goes)."""
    with pytest.raises(sspruner.PlanError, match=message):
        check_plan(Plan(groups), GRAPH)
    if "keeps every unit" not in message:
        with pytest.raises(sspruner.PlanError, match=message):
            check_plan(Plan({**half(GRAPH, "head_dim").groups, **groups}), GRAPH)


@given(st.data())
def test_plans_that_fit_are_let_through(data: st.DataObject) -> None:
    plan = data.draw(plans(GRAPH))
    check_plan(plan, GRAPH)
    assert plan.drops
    assert set(plan.axes) == {name.rpartition(":")[2] for name in plan.groups}


ATTENTION = {
    f: sspruner.trace(zoo(f)) for f in FAMILIES if "block" in AXES[f] and f not in ("mamba2", "mamba", "falcon_mamba")
}


def blocks_with(graph: sspruner.SSMGraph, kind: str) -> set[int]:
    """The blocks in which there is a mixer, or an attention layer."""
    sites = graph.layers if kind == "mixer" else [s for s in graph.sites if s.kind == "attention"]
    paths = [path for site in sites for path in (site.path, *site.aliases)]
    return {int(path.removeprefix(f"{graph.blocks}.").split(".")[0]) for path in paths}


def count_blocks(graph: sspruner.SSMGraph) -> int:
    return graph.groups[f"{graph.blocks}:block"].units


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        (family, kind)
        for family, graph in ATTENTION.items()
        for kind in ("mixer", "attention layer")
        if len(blocks_with(graph, kind)) < count_blocks(graph)  # else to drop them all is to keep nothing
    ],
)
def test_a_plan_that_drops_every_one_is_refused(family: str, kind: str) -> None:
    """No state-space model is left, or a cache that cannot count tokens; leaving one is enough."""
    graph = ATTENTION[family]
    name, blocks = f"{graph.blocks}:block", set(range(count_blocks(graph)))
    have = blocks_with(graph, kind)
    without = Plan({name: Selection(len(blocks), (tuple(sorted(blocks - have)),))})
    with pytest.raises(sspruner.PlanError, match=f"drops every {kind}; one has to stay: leave it alone with ignore"):
        check_plan(without, graph)
    other = blocks_with(graph, "attention layer" if kind == "mixer" else "mixer")
    stay = tuple(sorted({*(blocks - have), max(have), max(other)}))
    check_plan(Plan({name: Selection(len(blocks), (stay,)), **half(graph).groups}), graph)


def test_two_axes_that_drop_every_mixer_together_are_refused() -> None:
    """bamba MMAM: the blocks 0 and 1 go, and the mixer of block 3 alone."""
    graph = ATTENTION["bamba"]
    block, mixer = Selection(4, ((2, 3),)), Selection(3, ((0, 1),))
    check_plan(Plan({"model.layers:block": block}), graph)
    check_plan(Plan({"model.layers:mixer": mixer}), graph)
    with pytest.raises(sspruner.PlanError, match="drops every mixer"):
        check_plan(Plan({"model.layers:block": block, "model.layers:mixer": mixer}), graph)


def test_falcon_h1_keeps_its_mixers_or_its_blocks() -> None:
    """Attention stands beside every mixer: all of them but one may go."""
    graph = ATTENTION["falcon_h1"]
    assert graph.on_axis("mixer")["model.layers:mixer"].units == 3
    check_plan(Plan({"model.layers:mixer": Selection(3, ((1,),))}), graph)
    with pytest.raises(sspruner.PlanError, match="keeps nothing"):
        check_plan(Plan({"model.layers:mixer": Selection(3, ((),))}), graph)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"version": 2}', '{"version": 1}', '{"version": 1, "axis": "state", "groups": []}',
     '{"version": 1, "axis": "state", "groups": {"a:state": {"before": "x", "keep": [[1]]}}}',
     '{"version": 1, "axis": "state", "groups": {"a:state": {"before": 4, "keep": [[1.5, true]]}}}',
     '{"version": 1, "axis": "state", "groups": {"a:state": {"before": 4, "keep": [1]}}}',
     '{"version": 1, "axis": "state", "groups": {"a:state": {"before": 4, "keep": [[5]]}}}',
     '{"version": 1, "axis": "state", "groups": {"a:state": {"before": 4, "keep": []}}}',
     '{"version": 1, "groups": {"a:state": {"before": 4, "keep": [[1], [1, 2]]}}}',
     '{"version": 1, "groups": {"a:state": {"before": 4, "keep": [[1]]}}, "model": 3}',
     '{"version": 1, "groups": {"a:state": {"keep": [[1]]}}}', "[" * 100_000],
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


def test_the_axis_is_in_the_name() -> None:
    """A plan file's own `axis` is for people: it is written, and what the names say is what counts."""
    plan = Plan({STATES[0]: Selection(8, ((0, 1), (0, 1))), HEADS[0]: Selection(4, ((0,), (1,)))})
    data = plan.to_json()
    assert data["axis"] == "state,head"
    assert plan.axes == ("state", "head")
    assert Plan.from_json({**data, "axis": "block"}) == plan
    del data["axis"]
    assert Plan.from_json(data) == plan


@given(st.data())
def test_drops_is_whether_anything_goes(data: st.DataObject) -> None:
    plan = data.draw(plans(GRAPH))
    whole = {n: replace(s, keep=(tuple(range(s.before)),) * len(s.keep)) for n, s in plan.groups.items()}
    assert plan.drops
    assert not Plan(whole).drops
    assert not Plan({}).drops


def test_printing() -> None:
    plan = Plan({STATES[0]: Selection(8, ((0, 1), (0, 1))), BLOCK: Selection(3, ((0, 2),))})
    assert str(plan) == (f"plan on state, block\n  {STATES[0]}  8 -> 2\n  {BLOCK:<{len(STATES[0])}}  3 -> 2")
