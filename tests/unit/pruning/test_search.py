"""The cut that meets limits, the scorer that costs least, and one size for all layers."""

from __future__ import annotations

import copy
import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner.budgets.budget import ResolvedBudget
from sspruner.evaluation.damage import Damage, damages
from sspruner.evaluation.paired import Interval
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Selection
from sspruner.pruning import decide as deciding
from sspruner.pruning import search
from sspruner.recipes.parts import Limits
from sspruner.scoring.choice import candidates, choose_scorers
from sspruner.scoring.known import installed_scorers
from sspruner.surgery.sizes import sizes
from support.command import run, saved_model
from support.command import run as cli
from support.scoring import calibrated
from support.tiny import tiny_model, tokens
from support.unit_groups import unit_groups
from support.zoo import zoo

MODEL = tiny_model(layers=3, state=12)
GRAPH = sspruner.trace(MODEL)
DATA = calibrated(tokens(6, 24))
BATCHES = list(DATA.batches(3))
SCORES = sspruner.score(MODEL, "ghost", calibration=DATA)


def make(sparsity: float) -> Plan:
    return sspruner.plan(GRAPH, SCORES, sparsity=sparsity)


def met(
    limits: Limits,
    patch: pytest.MonkeyPatch | None = None,
    costs: list[float] | None = None,
    asked: list[float] | None = None,
) -> Any:
    """`meet` on the model above; with costs, a perplexity increase for each of the eleven cuts instead of measuring."""
    asked = [] if asked is None else asked
    cuts = search.fractions(GRAPH.on_axis("state"), 1)

    def pretend(model: Any, plans: Any, graph: Any, batches: Any) -> list[Damage]:
        (plan,) = plans
        after = next(iter(plan.groups.values())).after
        i = next(i for i, s in enumerate(cuts) if round(12 * (1 - s)) == after)
        asked.append(cuts[i])
        return [Damage(100.0, 100.0 * (1 + costs[i]), costs[i], 10, Interval.exactly(1 + costs[i]))]  # type: ignore[index]

    if patch and costs is not None:
        patch.setattr(search, "damages", pretend)
    return search.meet(MODEL, GRAPH, make, cuts, limits, BATCHES), asked, cuts


def test_the_cuts_that_are_looked_at():
    assert search.fractions(unit_groups((2, 8), (1, 4), own=2), 1) == pytest.approx([0.25, 0.5, 0.75])
    assert search.fractions(unit_groups((1, 12)), 4) == pytest.approx([1 / 3, 2 / 3])
    assert len(search.fractions(GRAPH.on_axis("state"), 1)) == 11


@given(bytes_=st.integers(1, 6000))
def test_a_limit_of_size_takes_the_mildest_cut_that_fits(bytes_):
    limits = Limits(state_bytes=bytes_)
    fitting = [
        s for s in search.fractions(GRAPH.on_axis("state"), 1) if sizes(MODEL, GRAPH, make(s)).state_bytes <= bytes_
    ]
    if GRAPH.state_bytes <= bytes_:
        with pytest.raises(
            sspruner.InputError, match=r"the dense model is within the limits: state per sequence [\d.]+ k?B of"
        ):
            met(limits)
    elif not fitting:
        with pytest.raises(sspruner.InputError, match=r"even with 91\.7% of the axis removed"):
            met(limits)
    else:
        found, asked, _ = met(limits)
        assert found.sparsity == fitting[0]
        assert not asked


@given(limit=st.floats(0.001, 2), seed=st.integers(0, 999), even=st.booleans())
def test_a_limit_of_damage_takes_a_cut_that_was_measured_within_it(limit, seed, even):
    generator = torch.Generator().manual_seed(seed)
    costs = torch.rand(11, generator=generator).tolist()
    costs = sorted(costs) if even else costs
    with pytest.MonkeyPatch.context() as patch:
        for limits in (Limits(perplexity_increase=limit), Limits(kl=limit)):
            try:
                found, asked, cuts = met(limits, patch, costs)
            except sspruner.InputError as error:
                assert f"even the mildest cut, 8.3%: " in str(error)  # noqa: PT017, F541
                assert costs[0] > limit
                continue
            chosen = cuts.index(found.sparsity)
            assert costs[chosen] <= limit
            assert len(asked) == len(set(asked)) <= math.ceil(math.log2(12)) + 1
            if even:
                assert chosen == max(i for i, cost in enumerate(costs) if cost <= limit)
            curve = {point.sparsity: point.kl for point in found.curve}
            assert curve == pytest.approx({s: costs[cuts.index(s)] for s in asked})
            assert list(curve) == sorted(curve)


def test_a_limit_that_no_cut_meets_measures_each_once(monkeypatch):
    asked: list[float] = []
    with pytest.raises(sspruner.InputError, match=r"even the mildest cut, 8\.3%: KL is 0\.5, more than 0\.1"):
        met(Limits(kl=0.1), monkeypatch, [0.5] * 11, asked)
    assert len(asked) == len(set(asked)) > 1


def test_both_limits_have_to_be_met():
    few = Limits(state_bytes=GRAPH.state_bytes // 2, kl=1e9)
    found, _, _ = met(few)
    assert found.sparsity == pytest.approx(0.5)
    assert [point.kl is None for point in found.curve].count(False) == 1
    with pytest.raises(sspruner.InputError, match=r"the mildest cut that fits removes 50\.0%, and KL is"):
        met(Limits(state_bytes=GRAPH.state_bytes // 2, kl=1e-9))


@pytest.mark.slow
def test_measured_costs_are_those_of_the_cut():
    found, _, _ = met(Limits(kl=0.05))
    for point in found.curve:
        (cost,) = damages(MODEL, [make(point.sparsity)], GRAPH, BATCHES)
        assert (point.perplexity, point.kl) == pytest.approx((cost.pruned_perplexity, cost.kl))
        cut = copy.deepcopy(MODEL)
        sspruner.apply(cut, make(point.sparsity))
        assert point.parameters == sum(p.numel() for p in cut.parameters())
        assert point.state_bytes == sspruner.trace(cut).state_bytes


# Among scorers


def test_the_scorer_of_least_perplexity_is_chosen_and_what_cannot_cut_is_said():
    scores = sspruner.score(MODEL, ["random", "ghost", "magnitude"], calibration=DATA)
    makes: dict[str, Any] = {n: lambda s=s: sspruner.plan(GRAPH, s, sparsity=0.75) for n, s in scores.items()}
    makes["never"] = lambda: sspruner.plan(GRAPH, SCORES, keep=99)
    found = search.choose_scorer(MODEL, GRAPH, makes, BATCHES)
    costs = {n: damages(MODEL, [makes[n]()], GRAPH, BATCHES)[0].pruned_perplexity for n in scores}
    assert {n: cost.pruned_perplexity for n, cost in found.costs.items()} == pytest.approx(costs)
    assert found.label == min(costs, key=costs.__getitem__)
    assert "has only 12 units" in found.refused["never"]
    with pytest.raises(sspruner.InputError, match="has only 12 units"):
        search.choose_scorer(MODEL, GRAPH, {"never": makes["never"]}, BATCHES)


@pytest.mark.parametrize("axis", ["state", "head", "mlp", "block"])
def test_auto_chooses_among_all_that_only_select(axis):
    found = candidates(axis, "select")
    for name, (cls, _) in installed_scorers().items():
        able = (
            axis in cls.axes and cls.basis == "select" and cls.reduce is sspruner.Scorer.reduce and cls.needs != "loss"
        )
        assert (name in found) == able
    assert choose_scorers("auto", None, [axis]) == found
    assert choose_scorers("auto:ghost, balanced", None, ["state"]) == ["ghost", "balanced"]


@pytest.mark.parametrize(
    ("scorer", "axes", "says"),
    [
        ("auto", ["state", "head"], "chooses for one axis"),
        ("auto", ["weight"], "chooses for one axis"),
        ("auto:ghst", ["state"], "ghst"),
        ("auto:flap,ghost", ["head"], "'flap' changes weights"),
    ],
)
def test_where_auto_has_no_choice(scorer, axes, says):
    with pytest.raises(sspruner.InputError, match=says):
        choose_scorers(scorer, None, axes)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "axis", "sparsity"), [("mamba2", "state", 0.5), ("mamba", "channel", 0.5)])
def test_auto_is_never_worse_than_a_scorer_on_calibration_text(family, axis, sparsity):
    model, data = zoo(family), calibrated(tokens(6, 20))
    graph = sspruner.trace(model)
    result = sspruner.prune(model, "auto", axis=axis, sparsity=sparsity, calibration=data, mode="mask")
    sspruner.unmask(model)
    seen = result.report.search["scorers"]
    assert len(seen) == len(candidates(axis, "select"))
    assert result.report.scorer in seen
    (auto,) = damages(model, [result.plan], graph, data.batches(6))
    for name, cost in seen.items():
        try:
            scores = sspruner.score(model, name, axis=axis, calibration=data)
        except sspruner.InputError as error:
            assert str(error) == cost  # noqa: PT017  # a scorer that refuses this model is left out, with its reason
            continue
        (own,) = damages(model, [sspruner.plan(graph, scores, sparsity=sparsity)], graph, data.batches(6))
        assert cost == pytest.approx(own.pruned_perplexity, rel=1e-4)
        assert auto.pruned_perplexity <= own.pruned_perplexity * (1 + 1e-6)


@pytest.mark.slow
def test_auto_with_a_limit_takes_the_scorer_that_can_cut_most():
    model = copy.deepcopy(MODEL)
    alone = {}
    for name in ("random", "ghost", "magnitude"):
        own = sspruner.score(model, name, calibration=DATA)
        try:
            found = search.meet(
                model, GRAPH, lambda s, own=own: sspruner.plan(GRAPH, own, sparsity=s),
                search.fractions(GRAPH.on_axis("state"), 1), Limits(kl=0.08), DATA.batches(99),
            )  # fmt: skip
            alone[name] = found.sparsity
        except sspruner.InputError:
            continue
    result = sspruner.prune(model, "auto:random,ghost,magnitude", limits=Limits(kl=0.08), calibration=DATA, mode="mask")
    assert result.report.budget["sparsity"] == pytest.approx(max(alone.values()))
    assert alone[result.report.scorer] == max(alone.values())


@pytest.mark.slow
def test_with_a_limit_of_size_auto_takes_the_scorer_that_costs_least_though_another_has_to_cut_more():
    model, data = zoo("zamba2"), calibrated(tokens(6, 20))
    graph, limits = sspruner.trace(model), Limits(parameters=0.8)
    groups = graph.on_axis("block")
    ((name, group),) = groups.items()
    differ = 0
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        scores = {f"s{i}": sspruner.Scores({name: torch.rand(1, group.units, generator=generator)}) for i in range(3)}
        met: dict[str, float] = {}
        for label, own in scores.items():
            for sparsity in search.fractions(groups, 1):  # mildest first
                plan = sspruner.plan(graph, own, sparsity=sparsity)
                if not sizes(model, graph, plan).exceeds(limits, sizes(model, graph)):
                    met[label] = sparsity
                    break
        plans = [sspruner.plan(graph, scores[label], sparsity=sparsity) for label, sparsity in met.items()]
        costs = [cost.pruned_perplexity for cost in damages(model, plans, graph, data.batches(6))]
        differ += len(set(met.values())) > 1
        found = search.settle(model, graph, groups, scores, ResolvedBudget(sparsity=0.5), limits, data)
        assert found.label == list(met)[costs.index(min(costs))]
        assert found.budget.sparsity == met[found.label]
        assert found.evidence["scorers"] == pytest.approx(dict(zip(met, costs, strict=True)), rel=1e-6)
        assert found.evidence["curve"][-1]["sparsity"] >= met[found.label]
    assert differ > 2


@pytest.mark.slow
def test_the_scorers_that_can_cut_less_are_said():
    scores = sspruner.score(MODEL, ["random", "ghost", "magnitude"], calibration=DATA)
    alone = {}
    for name, own in scores.items():
        try:
            alone[name] = search.meet(
                MODEL, GRAPH, lambda s, own=own: sspruner.plan(GRAPH, own, sparsity=s),
                search.fractions(GRAPH.on_axis("state"), 1), Limits(kl=0.08), BATCHES,
            ).sparsity  # fmt: skip
        except sspruner.InputError:
            continue
    found = search.settle(
        MODEL, GRAPH, GRAPH.on_axis("state"), scores, ResolvedBudget(sparsity=0.5), Limits(kl=0.08), DATA
    ).evidence["scorers"]
    less = {name for name, sparsity in alone.items() if sparsity < max(alone.values())}
    assert less
    for name in less:
        assert found[name] == f"within the limits it removes {alone[name]:.1%}; another more"


def test_auto_and_adaptive_exclude_each_other():
    with pytest.raises(sspruner.InputError, match="name it, instead of auto"):
        sspruner.prune(copy.deepcopy(MODEL), "auto", sparsity=0.5, allocation="adaptive", calibration=DATA)


def test_compare_refuses_adaptive_before_any_work():
    with pytest.raises(sspruner.InputError, match="measures the layers of one scorer"):
        sspruner.compare(MODEL, ["ghost"], allocation="adaptive", calibration="no such file")


# One size, and prune


def test_one_size_for_all_has_as_many_units():
    scores = sspruner.Scores({n: s * (1 + 9 * i) for i, (n, s) in enumerate(SCORES.importance.items())})
    uneven = sspruner.plan(GRAPH, scores, sparsity=0.5, allocation="global")
    kept = [uneven.groups[n].after if n in uneven.groups else 12 for n in GRAPH.on_axis("state")]
    assert len(set(kept)) > 1
    found = search.same_size(uneven, GRAPH, 1, lambda keep: sspruner.plan(GRAPH, scores, keep=keep))
    assert {group.after for group in found.groups.values()} == {sum(kept) // 3}
    assert search.same_size(make(0.5), GRAPH, 1, lambda keep: None) is None  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize(
    ("kept", "multiple_of", "one"), [((3, 6, 7), 1, 5), ((12, 12, 11), 1, 11), ((1, 1, 2), 1, 1), ((3, 9, 12), 3, 6)]
)
def test_one_size_is_not_above_the_plan_it_stands_for(kept, multiple_of, one):
    groups = dict(zip(GRAPH.on_axis("state"), kept, strict=True))
    uneven = Plan({n: Selection(12, (tuple(range(k)),)) for n, k in groups.items() if k < 12})
    asked: list[int] = []
    search.same_size(uneven, GRAPH, multiple_of, lambda keep: asked.append(keep) or uneven)  # type: ignore[func-returns-value]
    assert asked == [one]


def test_prune_says_what_one_size_would_cost():
    model = copy.deepcopy(MODEL)
    result = sspruner.prune(
        model, sparsity=0.5, ratios={"layers.0.*": 0.75}, one_shot=True, calibration=DATA, mode="mask"
    )
    sspruner.unmask(model)
    one = result.report.search["one_size"]
    plan = sspruner.plan(GRAPH, result.scores, keep=one["kept"])
    (cost,) = damages(model, [plan], GRAPH, DATA.held_out_batches(1))
    assert one["kept"] == 5
    assert one["perplexity"] == pytest.approx(cost.pruned_perplexity)


def test_limits_of_size_leave_prune_sequential():
    model = copy.deepcopy(MODEL)
    limits = Limits(state_bytes=GRAPH.state_bytes / 2)
    result = sspruner.prune(model, "ghost", limits=limits, calibration=DATA)
    assert not result.report.one_shot
    assert sspruner.trace(model).state_bytes * 2 == GRAPH.state_bytes
    assert result.report.search == {"limits": {"state_bytes": GRAPH.state_bytes / 2}}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"axis": {"state": 0.5}, "limits": Limits(kl=1)}, "name one axis, without a fraction"),
        ({"axis": "weight", "scorer": "magnitude", "limits": Limits(kl=1)}, "name one axis"),
        ({"sparsity": 0.5, "limits": Limits(kl=1)}, "leave out sparsity"),
        ({"allocation": "uniform-best"}, "within a limit of damage"),
        ({"allocation": "uniform-best", "limits": Limits(state_bytes=100)}, "within a limit of damage"),
        ({"allocation": "uniform-best", "limits": Limits(kl=1), "floor": {"*": 2}}, "no ratios, floor or cap"),
    ],
)
def test_limits_that_make_no_sense_are_refused_before_any_work(arguments, says):
    with pytest.raises(sspruner.InputError, match=says):
        sspruner.prune(copy.deepcopy(MODEL), calibration="no such file", **arguments)


def test_uniform_best_is_the_smallest_size_within_the_limit():
    costs = {k: damages(MODEL, [sspruner.plan(GRAPH, SCORES, keep=k)], GRAPH, BATCHES)[0].kl for k in range(1, 12)}
    limit = (costs[4] + costs[5]) / 2
    assert costs[5] < limit < costs[4]
    result = sspruner.prune(copy.deepcopy(MODEL), allocation="uniform-best", limits=Limits(kl=limit), calibration=DATA)
    assert {group.after for group in result.plan.groups.values()} == {5}
    assert result.report.one_shot


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_limit_on_the_command_line(tmp_path):
    small = ["--samples", "6", "--seq-len", "64", "--seed", "1"]
    report = tmp_path / "report.json"
    done = cli("prune", "--max-kl", "0.02", "--multiple-of", "16", *small, "--json", str(report))
    assert done.exit_code == 0, done.output
    assert "cuts looked at, on calibration text" in done.stdout
    assert done.stdout.count("chosen: ") == 1
    assert "KL: 0.0200 allowed, 0.0" in done.stdout
    assert " dense " in done.stdout
    data = json.loads(report.read_text())
    curve = {point["sparsity"]: point["kl"] for point in data["search"]["curve"]}
    assert curve[data["budget"]["sparsity"]] <= 0.02
    done = cli("prune", "--state-bytes", "400kB", "--scorer", "magnitude", *small)
    assert done.exit_code == 0, done.output
    assert "393.22 kB" in done.stdout
    assert "state per sequence: 400.00 kB allowed, 393.22 kB used" in done.stdout
    done = cli("prune", "--state-bytes", "4 GB", "--out", str(tmp_path / "out"), *small)
    assert done.exit_code == 0, done.output
    assert "the dense model is within the limits: state per sequence 1.57 MB of 4.00 GB allowed" in done.stdout
    assert not (tmp_path / "out").exists()
    for wrong, says in (
        (["--max-ppl-increase", "0.0001%", "--keep", "3"], "leave out sparsity, keep and pattern"),
        (["--memory", "4GB"], "max-batch and memory go together"),
        (["--params", "0.1x"], "even with"),
    ):
        failed = cli("prune", *small, *wrong)
        assert failed.exit_code == 2
        assert says in failed.stderr
        assert len(failed.stderr.strip().splitlines()) == 1


def test_limits_that_the_dense_model_is_within_are_success(tmp_path):
    """Found before any work: the numbers are printed, and nothing is written."""
    folder = saved_model(tmp_path / "m", layers=2)
    for limit in (["--state-bytes", "1MB"], ["--params", "1x"], ["--memory", "1GB", "--max-batch", "2"]):
        result = run("prune", folder, *limit, "--out", tmp_path / "out")
        assert (result.exit_code, result.stderr) == (0, ""), result.output
        said = " ".join(result.stdout.split())
        assert "the dense model is within the limits: " in said
        assert "allowed; nothing was removed, nothing written" in said
    assert not (tmp_path / "out").exists()


def test_auto_says_which_bases_it_did_not_try_and_who_was_left_out():
    """In lines of their own, not among numbers."""
    model, data = tiny_model(groups=2, state=6), tokens(6, 24)
    result = sspruner.prune(model, "auto", sparsity=0.5, calibration=data)
    assert result.report.search["bases_not_tried"] == ["balanced"]
    said = str(result)
    assert "directions may cost less: --basis balanced" in said
    joined = " ".join(said.split())
    numbers = joined.partition("perplexity by scorer, on calibration text: ")[2].partition("auto chose")[0]
    assert re.search(r"\bghost \d+\.\d+", numbers)
    skipped = {name: why for name, why in result.report.search["scorers"].items() if isinstance(why, str)}
    assert said.count("not compared: ") == len(skipped)
    named = sspruner.prune(tiny_model(groups=2, state=6), "auto:ghost,magnitude", sparsity=0.5, calibration=data)
    assert "bases_not_tried" not in named.report.search


@pytest.mark.parametrize(("factor", "worse"), [(0, False), (30, True)])  # a random model that says less errs less
def test_auto_keeps_a_refit_that_costs_less_on_calibration_text(factor, worse, monkeypatch):
    dense, data = tiny_model(state=6), tokens(24, 12)
    real, seen = deciding.refit, []

    def refit(model, plan, kind, **how):
        found = real(model, plan, kind, **how)
        updates = {name: factor * value for name, value in found.plan.updates.items()}
        seen.append(replace(found, plan=replace(found.plan, updates=updates)))
        return seen[-1]

    monkeypatch.setattr(deciding, "refit", refit)
    model, how = copy.deepcopy(dense), {"sparsity": 0.5, "refit": "output", "calibration": data}
    result = sspruner.prune(model, "auto:ghost,magnitude", **how)
    (found,), tried = seen, result.report.search["refits"]
    plans = [replace(found.plan, updates={}), found.plan]
    text = sspruner.calibration(data, dense)
    costs = damages(dense, plans, sspruner.trace(dense), text.batches(logits=True))
    assert [tried["none"], tried["output"]] == pytest.approx([cost.pruned_perplexity for cost in costs])
    assert (tried["output"] < tried["none"]) is not worse
    assert bool(result.plan.updates) is bool(result.report.refit) is not worse
    said = " ".join(str(result).split())
    assert ("the cut was left as it was" if worse else "output was kept") in said
    assert type(result.report).from_json(result.report.to_json()).search == result.report.search
    named = sspruner.prune(copy.deepcopy(dense), "ghost", **how)
    assert "refits" not in named.report.search
