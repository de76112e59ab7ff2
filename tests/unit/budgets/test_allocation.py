"""Where a budget goes: comparable scores, floors and caps, measured curves and the best split by them."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import sspruner
from sspruner.budgets.allocate import EVEN, allocate
from sspruner.budgets.budget import ResolvedBudget
from sspruner.budgets.comparable import comparable
from sspruner.budgets.decide import check_budget, compared, select
from sspruner.budgets.split import best_split, damage_at
from sspruner.evaluation.damage import damages
from sspruner.pruning.sensitivity import levels
from sspruner.scoring.known import find_scorer
from sspruner.testing.plans import random_projection
from support.command import run as cli
from support.scoring import calibrated
from support.tiny import tiny_model, tokens
from support.unit_groups import random_scores, unit_groups
from support.zoo import zoo

SHAPES = st.lists(st.tuples(st.integers(1, 2), st.integers(2, 6)), min_size=1, max_size=3)
CURVE = st.dictionaries(st.integers(1, 6), st.floats(0, 10), max_size=4)


# Scores on one scale


@given(seed=st.integers(0, 99), sets=st.integers(1, 3), units=st.integers(1, 6), scale=st.floats(1e-3, 1e3))
def test_energy_and_last_do_not_see_the_scale_of_a_layer(seed, sets, units, scale):
    scores = random_scores(unit_groups((sets, units)), seed)
    larger = {name: scale * value for name, value in scores.items()}
    for how in ("energy", "last"):
        one, two = (comparable(given, {"state": how})["l0:state"] for given in (scores, larger))
        assert torch.allclose(one, two, rtol=1e-5)
    assert torch.equal(comparable(larger, {"state": "none"})["l0:state"], larger["l0:state"])


@given(seed=st.integers(0, 99), sets=st.integers(1, 3), units=st.integers(1, 6), ties=st.booleans())
def test_what_the_scales_are(seed, sets, units, ties):
    scores = random_scores(unit_groups((sets, units)), seed)
    s = scores["l0:state"].double()
    if ties:
        s = (3 * s).round()
    found = {how: comparable({"l0:state": s}, {"state": how})["l0:state"] for how in ("energy", "last")}
    if not s.any():
        assert not found["energy"].any()
        assert not found["last"].any()
        return
    assert float(found["energy"].square().sum()) == pytest.approx(1)  # shares of the layer's energy
    for value, share in zip(s.flatten().tolist(), found["last"].flatten().tolist(), strict=True):
        assert share == pytest.approx(value**2 / sum(v**2 for v in s.flatten().tolist() if v >= value) if value else 0)


def test_last_is_the_scorers_own_share():
    share = __import__("sspruner_plugins.last", fromlist=["share"]).share
    s = torch.rand(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    assert torch.allclose(comparable({"l:state": s[None]}, {"state": "last"})["l:state"][0], share(s.square()))


@given(seed=st.integers(0, 99), sparsity=st.sampled_from([0.25, 0.5, 0.75]))
def test_one_layers_scale_moves_a_raw_threshold_alone(seed, sparsity):
    groups = unit_groups((1, 6), (1, 6))
    scores = random_scores(groups, seed)
    louder = scores | {"l0:state": 1000 * scores["l0:state"] + 1000}
    scaled = scores | {"l0:state": 1000 * scores["l0:state"]}
    for how in ("energy", "last"):
        budget = ResolvedBudget(sparsity, allocation="global", normalise=how)
        counts = [allocate(groups, budget, compared(sspruner.Scores(s), budget)) for s in (scores, scaled)]
        assert counts[0] == counts[1]
    raw = ResolvedBudget(sparsity, allocation="global", normalise="none")
    counts = allocate(groups, raw, compared(sspruner.Scores(louder), raw))
    assert counts["l0:state"] == 6 - max(0, 12 * sparsity - 5)


def test_the_scorer_says_whether_its_scores_compare():
    ids = tokens(2, 12)
    for name, how in (("ghost", "energy"), ("taylor", "none"), ("magnitude", "energy"), ("last", "none")):
        scores = sspruner.score(tiny_model(layers=2), name, calibration=calibrated(ids))
        own = find_scorer(name)[0].comparable
        assert json.loads(scores.metadata["comparable"]) == {"state": own}
        assert own == (how == "none")
        found, asked = compared(scores, ResolvedBudget(0.5)), comparable(scores.importance, {"state": how})
        assert all(torch.equal(found[n], asked[n]) for n in asked)


def test_a_plan_by_one_threshold_keeps_what_the_normalisation_says(tmp_path):
    model = tiny_model(layers=3, state=8)
    graph, scores = sspruner.trace(model), sspruner.score(model, "ghost", calibration=calibrated(tokens(4, 16)))
    scores.importance["backbone.layers.1.mixer:state"] *= 100
    scores.save(tmp_path / "s.safetensors")
    read = sspruner.Scores.load(tmp_path / "s.safetensors")
    plans = {
        how: sspruner.plan(graph, read, sparsity=0.5, allocation="global", normalise=how)
        for how in (None, "energy", "none")
    }
    assert plans[None].groups == plans["energy"].groups != plans["none"].groups
    assert "backbone.layers.1.mixer:state" not in plans["none"].groups  # the loud layer keeps all
    assert plans["none"].made_by["normalise"] == "none"
    assert "normalise" not in plans[None].made_by


# Floors and caps


@given(SHAPES, st.sampled_from([0.2, 0.5, 0.8]), st.integers(1, 2), st.integers(0, 99), st.data())
def test_floors_and_caps_hold_and_the_rest_meets_the_budget(shapes, sparsity, step, seed, data):
    groups = unit_groups(*shapes)
    floor, cap = data.draw(st.integers(1, 3)), data.draw(st.integers(3, 6))
    curves = {name: {k: seed / k for k in range(1, g.units)} for name, g in groups.items()}
    assume(min(g.units for g in groups.values()) >= floor)
    kept = {}
    for allocation in ("uniform", "global", "adaptive"):
        budget = ResolvedBudget(sparsity, allocation=allocation, multiple_of=step, floor={"*": floor}, cap={"l0": cap})
        try:
            kept[allocation] = allocate(groups, budget, random_scores(groups, seed), curves)
        except sspruner.InputError as error:
            said = str(error)  # not every draw can be met, but with a floor never for want of units
            assert "no size between" in said or "removes nothing" in said
            continue
        for name, count in kept[allocation].items():
            units = groups[name].units
            assert min(math.ceil(floor / step) * step, units) <= count <= units
            assert count % step == 0 or count == units
            if name == "l0:state" and cap < units:
                assert count <= cap
    if {"global", "adaptive"} <= kept.keys():
        free = [n for n in groups if n != "l0:state"]
        target = sum(g.groups * g.units * (1 - sparsity) for g in groups.values())
        total = sum(groups[n].groups * kept["adaptive"][n] for n in groups)
        least = sum(g.groups * min(math.ceil(floor / step) * step, g.units) for g in groups.values())
        assert total <= max(target + 1e-9, least)
        if free and all(kept["adaptive"][n] < groups[n].units for n in free):
            assert total > target - max(groups[n].groups * step for n in groups) - 1e-9 or total == least


@pytest.mark.parametrize("allocation", ["global", "adaptive"])
@pytest.mark.parametrize(
    ("bounds", "kept"),
    [({}, (8, 2, 2)), ({"cap": {"l0": 7}}, (6, 4, 2)), ({"floor": {"l2": 3}}, (6, 2, 4))],
)
def test_a_bound_of_one_layer_moves_units_of_the_others(allocation, bounds, kept):
    """l0 is worth most by far and l2 next to nothing; of the multiple 2 a cap is rounded down and a floor up."""
    groups, worth = unit_groups((1, 8), (1, 8), (1, 8)), {"l0:state": 100.0, "l1:state": 1.0, "l2:state": 0.01}
    scores = {name: value * torch.arange(8, 0, -1.0)[None] for name, value in worth.items()}
    curves = {name: {k: value / k for k in range(1, 8)} for name, value in worth.items()}
    budget = ResolvedBudget(0.5, allocation=allocation, multiple_of=2, **bounds)
    assert tuple(allocate(groups, budget, scores, curves).values()) == kept


@pytest.mark.parametrize(
    ("bounds", "says"),
    [
        ({"floor": {"*": 9}}, "floor 9: l0:state has only 6 units"),
        ({"floor": {"*": 0}}, "must be at least 1"),
        ({"cap": {"l9": 3}}, "pattern 'l9': matches nothing"),
        ({"floor": {"*": 5}, "cap": {"*": 3}}, "no size between floor 5 and cap 3"),
        ({"floor": {"*": 3}, "cap": {"*": 3}, "multiple_of": 2}, "no size between floor 3 and cap 3 in multiples of 2"),
        ({"floor": {"*": 3}, "keep": 3, "sparsity": None}, "leave out floor"),
        ({"normalise": "energi"}, "unknown normalisation 'energi'; known: none, energy, last"),
        ({"normalise": "energy"}, "is for allocation global"),
        ({"allocation": "adaptive"}, "was not measured"),
        ({"cap": {"*": 1}, "multiple_of": 2}, "no size between floor 1 and cap 1 in multiples of 2; the nearest are 2"),
        ({"sparsity": 0.99}, "removes everything"),
        ({"sparsity": 0.05}, "removes nothing"),
        ({"allocation": "adaptive", "keep": 3, "sparsity": None}, "allocation adaptive wants a sparsity"),
    ],
)
def test_what_makes_no_sense_is_refused(bounds, says):
    groups = unit_groups((1, 6), (2, 6))
    with pytest.raises(sspruner.InputError, match=says):
        allocate(groups, ResolvedBudget(**{"sparsity": 0.5} | bounds), random_scores(groups, 0))


def test_a_later_pattern_wins_and_a_budget_says_what_was_asked():
    groups = unit_groups((1, 6), (1, 6), (1, 6))
    budget = ResolvedBudget(0.5, floor={"*": 2, "l1": 5}, cap={"l2": 2})
    assert allocate(groups, budget) == {"l0:state": 3, "l1:state": 5, "l2:state": 2}
    assert budget.to_json()["floor"] == {"*": 2, "l1": 5}
    assert "floor" not in ResolvedBudget(0.5).to_json()


def test_a_floor_or_a_cap_decides_where_rounding_would_remove_all_or_nothing():
    groups = unit_groups((1, 6), (1, 6))
    assert allocate(groups, ResolvedBudget(0.99, floor={"*": 1})) == dict.fromkeys(groups, 1)
    assert allocate(groups, ResolvedBudget(0.99, floor={"*": 4, "l1": 6})) == {"l0:state": 4, "l1:state": 6}
    assert allocate(groups, ResolvedBudget(0.05, cap={"*": 5, "l1": 2})) == {"l0:state": 5, "l1:state": 2}
    with pytest.raises(sspruner.InputError, match=r"l1:state: 0\.99 removes everything"):
        allocate(groups, ResolvedBudget(0.99, floor={"l0": 1}))


@pytest.mark.parametrize(
    ("axis", "asked", "says"),
    [
        ("hidden", {"allocation": "adaptive"}, "wants an axis with a group of units in each layer"),
        ("block", {"allocation": "adaptive"}, "wants an axis with a group of units in each layer"),
        ("weight", {"allocation": "adaptive"}, "wants an axis with a group of units in each layer"),
        ("weight", {"floor": {"*": 4}}, "floor and cap count units"),
        ("weight", {"cap": {"layers.0.*": 4}}, "floor and cap count units"),
    ],
)
def test_axes_without_a_group_of_units_in_each_layer_are_refused_before_any_work(axis, asked, says):
    graph = sspruner.trace(tiny_model(layers=2))
    groups = {n: g for n, g in {**graph.groups, **graph.elements}.items() if g.axis == axis}
    check_budget(groups, ResolvedBudget(0.5))
    with pytest.raises(sspruner.InputError, match=says):
        check_budget(groups, ResolvedBudget(0.5, **asked))


def test_an_adaptive_budget_is_checked_before_anything_is_measured():
    groups = unit_groups((1, 6), (1, 6))
    check_budget(groups, ResolvedBudget(0.5, allocation="adaptive"))
    with pytest.raises(sspruner.InputError, match="floor 7"):
        check_budget(groups, ResolvedBudget(0.5, allocation="adaptive", floor={"*": 7}))


# Curves and the best split


@given(curve=CURVE, units=st.integers(2, 9))
def test_a_curve_is_monotone_and_exact_where_it_can_be(curve, units):
    curve = {k: v for k, v in curve.items() if k < units}
    costs = damage_at(curve, range(1, units + 1), units).tolist()
    assert costs[-1] == 0
    assert all(a >= b for a, b in itertools.pairwise(costs))
    for kept in curve:
        worst = max(v for k, v in curve.items() if k >= kept)
        assert costs[kept - 1] == pytest.approx(worst)


@given(seed=st.integers(0, 999), sets=st.lists(st.integers(1, 2), min_size=1, max_size=3), budget=st.integers(1, 14))
def test_the_split_is_the_best_of_all(seed, sets, budget):
    generator = torch.Generator().manual_seed(seed)
    names = [f"l{i}" for i in range(len(sets))]
    options = {n: sorted({1 + int(k) for k in torch.randint(5, (3,), generator=generator)}) for n in names}
    costs = {n: torch.rand(len(options[n]), generator=generator, dtype=torch.float64) for n in names}
    weight = dict(zip(names, sets, strict=True))
    found = best_split(options, costs, weight, budget)
    spent = {n: dict(zip(options[n], costs[n].tolist(), strict=True)) for n in names}
    every = [dict(zip(names, sizes, strict=True)) for sizes in itertools.product(*options.values())]
    within = [s for s in every if sum(weight[n] * k for n, k in s.items()) <= budget]
    if not within:
        assert found == {n: min(options[n]) for n in names}
        return
    best = min(sum(spent[n][k] for n, k in s.items()) for s in within)
    assert found in within
    assert sum(spent[n][k] for n, k in found.items()) == pytest.approx(best)


@given(seed=st.integers(0, 999), sparsity=st.sampled_from([0.25, 0.5, 0.75]))
def test_an_adaptive_split_costs_no_more_than_any_other_of_its_size(seed, sparsity):
    groups = unit_groups((1, 8), (1, 8), (2, 8))
    generator = torch.Generator().manual_seed(seed)
    curves = {n: {k: float(torch.rand((), generator=generator)) / k for k in (1, 2, 4, 6)} for n in groups}
    scores = random_scores(groups, seed)

    def total(counts: dict[str, int]) -> float:
        return sum(float(damage_at(curves[n], [counts[n]], 8)) for n in groups)

    adaptive = allocate(groups, ResolvedBudget(sparsity, allocation="adaptive"), curves=curves)
    assert sum(groups[n].groups * k for n, k in adaptive.items()) <= 32 * (1 - sparsity)
    assert total(adaptive) <= total(allocate(groups, ResolvedBudget(sparsity))) + 3 * EVEN
    by_score = allocate(groups, ResolvedBudget(sparsity, allocation="global"), scores)
    if sum(groups[n].groups * k for n, k in by_score.items()) <= 32 * (1 - sparsity):
        assert total(adaptive) <= total(by_score) + 3 * EVEN


@given(
    layers=st.integers(2, 4),
    step=st.sampled_from([1, 2]),
    sparsity=st.sampled_from([0.25, 0.5, 0.75]),
    curve=st.sampled_from([{}, {1: 0.0}, {4: 0.0, 1: 0.0}, {4: 0.0, 2: 0.5}, {1: 0.7}]),
)
def test_of_splits_that_cost_the_same_the_most_even_is_taken(layers, step, sparsity, curve):
    """On flat and straight curves a unit is worth the same in every layer."""
    groups = unit_groups(*[(1, 8)] * layers)
    budget = ResolvedBudget(sparsity, allocation="adaptive", multiple_of=step)
    kept = allocate(groups, budget, curves=dict.fromkeys(groups, curve))
    assert max(kept.values()) - min(kept.values()) <= step
    assert sum(kept.values()) == layers * 8 * (1 - sparsity) // step * step


def test_a_large_model_is_split_quickly_enough_to_be_exact():
    options = {f"l{i}": list(range(1, 129)) for i in range(64)}
    slopes = {name: 1 + i for i, name in enumerate(options)}
    costs = {name: torch.tensor([slopes[name] / k for k in options[name]], dtype=torch.float64) for name in options}
    found = best_split(options, costs, dict.fromkeys(options, 1), 64 * 32)
    assert sum(found.values()) == 64 * 32
    # The optimum of sum c_i / k_i is k_i ~ sqrt(c_i): no exchange of one unit between two layers helps.
    gain = {n: slopes[n] / k - slopes[n] / (k + 1) for n, k in found.items() if k < 128}
    loss = {n: slopes[n] / (k - 1) - slopes[n] / k for n, k in found.items() if k > 1}
    assert max(gain.values()) <= min(loss.values()) + 1e-12


# What is measured


@pytest.mark.ci_cover(most=1)
@pytest.mark.slow
@pytest.mark.parametrize("projected", [False, True])
def test_a_curve_is_the_damage_of_one_layer_alone(projected):
    model = zoo("zamba2")
    graph, data = sspruner.trace(model), calibrated(tokens(3, 16))
    scores = sspruner.score(model, "ghost", calibration=data)
    if projected:
        generator = torch.Generator().manual_seed(0)
        for name, importance in scores.importance.items():
            made = random_projection(*importance.shape, importance.shape[1], generator)
            scores.bases[name] = made.encode, made.decode
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = sspruner.sensitivity(model, scores, data)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found.tokens == 48
    assert found.curves.keys() == scores.importance.keys()
    for name, curve in found.curves.items():
        assert list(curve) == levels(graph.groups[name], 1)
        for kept, kl in curve.items():
            plan = sspruner.Plan({name: select(scores.importance[name], kept, basis=scores.bases.get(name))})
            (cost,) = damages(model, [plan], graph, data.batches(2))
            assert kl == pytest.approx(max(cost.kl, 0), rel=1e-4, abs=1e-9)


def test_levels_are_sizes_that_the_layer_can_have():
    (group,) = unit_groups((2, 128), own=4).values()
    assert levels(group, 1) == [96, 64, 32, 16, 8, 4]
    assert levels(group, 3) == [96, 60, 36, 12]
    (small,) = unit_groups((1, 2)).values()
    assert levels(small, 1) == [1]


def test_a_sensitivity_goes_through_a_file(tmp_path):
    found = sspruner.Sensitivity({"a:state": {3: 0.25, 1: 1.5}}, 64, {"model": "f", "scorer": "ghost"})
    found.save(tmp_path / "curves.json")
    assert sspruner.Sensitivity.load(tmp_path / "curves.json") == found
    for content in ("", "[]", '{"curves": {"a": {"x": 1}}, "tokens": 1}', '{"curves": {"a": {"1": NaN}}, "tokens": 1}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(sspruner.InputError, match=r"bad\.json.*measure it again"):
            sspruner.Sensitivity.load(tmp_path / "bad.json")
    with pytest.raises(sspruner.InputError, match="missing"):
        sspruner.Sensitivity.load(tmp_path / "missing.json")


def test_curves_of_another_scorer_or_model_are_refused(tmp_path):
    model, other, data = tiny_model(layers=2), tiny_model(layers=2, seed=1), calibrated(tokens(2, 12))
    scores = {name: sspruner.score(model, name, calibration=data) for name in ("ghost", "magnitude")}
    found = sspruner.sensitivity(model, scores["ghost"], data)
    found.save(tmp_path / "curves.json")
    read = sspruner.Sensitivity.load(tmp_path / "curves.json")
    read.check(scores["ghost"])
    with pytest.raises(sspruner.InputError, match="measured with scorer ghost, the scores are of magnitude"):
        read.check(scores["magnitude"])
    with pytest.raises(sspruner.InputError, match="measured with model"):
        read.check(sspruner.score(other, "ghost", calibration=data))
    means = sspruner.score(model, "ghost", calibration=data, options={"variant": "means"})
    with pytest.raises(sspruner.InputError, match="measured with options"):
        read.check(means)


@pytest.mark.slow
def test_prune_measures_and_splits_by_what_it_measured():
    model = tiny_model(layers=4, state=8)
    data = calibrated(tokens(6, 24))
    scores = sspruner.score(model, "ghost", calibration=data)
    curves = sspruner.sensitivity(model, scores, data).curves
    graph = sspruner.trace(model)
    made = sspruner.plan(graph, scores, sparsity=0.5, allocation="adaptive", curves=curves)
    result = sspruner.prune(model, sparsity=0.5, allocation="adaptive", calibration=data)
    assert result.plan.groups == made.groups
    assert result.report.search["curves"] == curves
    assert result.report.budget["allocation"] == "adaptive"


@pytest.mark.exhaustive
@pytest.mark.slow
def test_curves_and_bounds_on_the_command_line(tmp_path):
    small = ["--samples", "4", "--seq-len", "32"]
    scores, curves, plan = (str(tmp_path / name) for name in ("s.safetensors", "curves.json", "plan.json"))
    done = cli("score", *small, "--out", scores, "--curves", curves)
    assert done.exit_code == 0, done.output
    assert "damage of cutting each layer alone, on 128 tokens" in done.stdout
    asked = ["plan", "--scores", scores, "--sparsity", "0.9", "--allocation", "adaptive", "--out", plan]
    done = cli(*asked, "--curves", curves, "--floor", "8", "--cap", "layers.0.*=16")
    assert done.exit_code == 0, done.output
    kept = {name: group.after for name, group in sspruner.Plan.load(plan).groups.items()}
    assert min(kept.values()) >= 8
    assert kept["backbone.layers.0.mixer:state"] <= 16
    others = str(tmp_path / "others.safetensors")
    assert cli("score", *small, "--scorer", "magnitude", "--out", others).exit_code == 0
    of_others = ["--curves", curves, "--scores", others]
    for wrong, says in (([], "was not measured"), (["--curves", scores], "cannot be read"),
                        (of_others, "measured with scorer ghost, the scores are of magnitude"),
                        (["--curves", curves, "--floor", "x"], "expected UNITS or PATTERN=UNITS")):  # fmt: skip
        failed = cli(*asked, *wrong)
        assert failed.exit_code == 2
        assert says in failed.stderr


def test_between_points_a_power_law_is_met_exactly():
    curve = {k: 3.0 * k**-1.5 for k in (96, 32, 8, 2)}
    kept = [2, 3, 5, 8, 20, 32, 64, 96]
    assert damage_at(curve, kept, 128).tolist() == pytest.approx([3.0 * k**-1.5 for k in kept])
    assert damage_at(curve, [1, 112, 128], 128).tolist() == pytest.approx([3.0, curve[96] / 2, 0])
