"""The exports hf and hf-padded: stock transformers loads them, in a fresh process without sspruner; or a reason."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner.formats.stock import padded
from sspruner.graph.group import BARRED_LOGITS
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Selection
from support.command import run as cli
from support.examples import examples
from support.projected import every_state
from support.round_trip import GREEDY, uniform
from support.stock_process import run_stock
from support.tiny import half, logits, models, plans, tiny_model, tokens
from support.zoo import FAMILIES, zoo, zoo_models

READ = """
import copy, json, sys
import torch
from transformers import AutoModelForCausalLM
ids = torch.tensor(json.loads(sys.argv[1]))
found = {}
for folder in sys.argv[3:]:  # copies: weights that are mapped from a file may lie unaligned, and BLAS rounds otherwise
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    model = copy.deepcopy(loaded).eval()
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    made = model.generate(ids, attention_mask=torch.ones_like(ids), **json.loads(sys.argv[2]))
    found[folder] = {"logits": logits.double().tolist(), "made": made.tolist()}
print(json.dumps(found))
"""
WITHIN = ("block", "mixer")  # axes that remove modules: zeros cannot stand for those


def read_back(folders: list[Path], ids: torch.Tensor, home: Path) -> list[dict[str, Any]]:
    arguments = [json.dumps(ids.tolist()), json.dumps(GREEDY), *map(str, folders)]
    found = run_stock(READ, *arguments, log=home / "read.log")
    return [found[str(folder)] for folder in folders]


def assert_same(found: dict[str, Any], model: torch.nn.Module, ids: torch.Tensor, limit: float) -> None:
    expected = logits(model, ids).double()
    assert (torch.tensor(found["logits"]) - expected).abs().max() <= limit * expected.abs().max()
    assert found["made"] == model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY).tolist()


def one_layer(model: torch.nn.Module, axis: str) -> Plan:
    plan = half(sspruner.trace(model), axis)
    name = next(iter(plan.groups))
    return Plan({name: plan.groups[name]})


def cut(family: str, axis: str, first: bool) -> torch.nn.Module:
    """Half of an axis, in every layer or in the first alone; a model that is wide enough to halve it."""
    model = zoo(family, hidden=16)
    return sspruner.apply(model, one_layer(model, axis) if first else half(sspruner.trace(model), axis))


def unpadded(model: torch.nn.Module) -> set[str]:
    """Axes that are not padded: whole modules, and experts that a router without a bias would choose."""
    members = [m for group in sspruner.trace(model).groups.values() for m in group.members]
    return {*WITHIN, *(["expert"] if any(m.mask == BARRED_LOGITS for m in members) else [])}


@pytest.mark.ci_cover(families=1)
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_what_stock_classes_can_build_they_load_exactly(family: str, tmp_path: Path) -> None:
    """The state cut to one size, in every family; the original, too."""
    ids, dense = tokens(2, 9), zoo(family)
    small = zoo(family)
    sspruner.apply(small, uniform(small, (0, 2, 3)))
    folders = [sspruner.export(m, tmp_path / name) for m, name in ((dense, "dense"), (small, "small"))]
    assert "sspruner" not in json.loads((folders[1] / "config.json").read_text())
    assert small.config.sspruner["cuts"]  # the model itself keeps its record
    for found, model in zip(read_back(folders, ids, tmp_path), (dense, small), strict=True):
        assert_same(found, copy.deepcopy(model), ids, 0)


@pytest.mark.ci_cover(families=1)
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_any_axis_is_padded_for_stock_classes(family: str, tmp_path: Path) -> None:
    """Half of every axis with rows to pad, by turns in the first layer alone and in all: the same logits and text."""
    ids = tokens(2, 9)
    axes = [axis for axis in sspruner.trace(zoo(family, hidden=16)).axes if axis not in unpadded(zoo(family))]
    cuts = {axis: cut(family, axis, first=number % 2 == 0) for number, axis in enumerate(axes)}
    folders = [sspruner.export(model, tmp_path / name, to="hf-padded") for name, model in cuts.items()]
    for found, model in zip(read_back(folders, ids, tmp_path), cuts.values(), strict=True):
        assert_same(found, model, ids, 1e-3)  # of these random models; each export was proved to its own rounding


@examples(20)
@given(st.one_of(zoo_models(), models(least_state=2)), st.data())
def test_padding_is_exact_for_any_plan(model: torch.nn.Module, data: st.DataObject) -> None:
    """Any axes at once, in any layers, twice: padded and cut models agree, and cutting the padded one gives the cut."""
    never = unpadded(model)
    for _ in range(data.draw(st.integers(1, 2))):
        plan = data.draw(plans(sspruner.trace(model)))
        kept = {n: s for n, s in plan.groups.items() if n.rpartition(":")[2] not in never and isinstance(s, Selection)}
        if kept:
            sspruner.apply(model, Plan(kept))
    small, large = sspruner.trace(model), padded(model)
    whole = sspruner.trace(large)
    assert large.config.dtype == model.dtype
    assert not hasattr(large.config, "sspruner")
    for name, group in small.groups.items():
        assert whole.groups[name].units >= group.units
    again = Plan(
        {
            n: Selection(g.units, (tuple(range(small.groups[n].units if n in small.groups else 1)),) * g.groups)
            for n, g in whole.groups.items()
            if g.axis not in WITHIN and (small.groups[n].units if n in small.groups else 1) < g.units
        }
    )
    if again.groups:
        sspruner.apply(large, again)
    assert str(sspruner.trace(large)) == str(small)


def test_the_state_is_padded_to_the_largest_layer_only(tmp_path: Path) -> None:
    model = tiny_model(state=12, layers=3)
    names = list(sspruner.trace(model).on_axis("state"))
    groups = sspruner.trace(model).groups
    plan = Plan(
        {n: Selection(12, (tuple(range(k)),) * groups[n].groups) for n, k in zip(names, (2, 7, 4), strict=True)}
    )
    sspruner.apply(model, plan)
    large = padded(model)
    assert {g.units for g in sspruner.trace(large).on_axis("state").values()} == {7}
    assert large.config.state_size == 7


def test_padded_rows_are_zero() -> None:
    model = tiny_model(state=6)
    sspruner.apply(model, one_layer(model, "state"))
    large = padded(model)
    group = next(iter(sspruner.trace(large).on_axis("state").values()))
    for member in group.members:
        assert not member.gather(large.get_parameter(member.tensor))[:, 3:].any()


@pytest.mark.parametrize(
    ("axis", "first", "says"),
    [
        (
            "state",
            True,
            r"hf cannot express this cut: .*conv1d.weight is .*nearest that it builds: --axis state --keep 5, ",
        ),
        ("head", False, r"nearest that it builds: head uncut, at 4"),
        ("mixer", False, r"hf cannot express this cut: the module .* alone"),
    ],
)
def test_stock_refuses_with_the_nearest_cut(axis: str, first: bool, says: str, tmp_path: Path) -> None:
    model = zoo("falcon_h1") if axis == "mixer" else tiny_model(heads_per_group=4, state=6, layers=3)
    sspruner.apply(model, one_layer(model, axis) if first else half(sspruner.trace(model), axis))
    with pytest.raises(sspruner.ModelError, match=says):
        sspruner.export(model, tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()


def test_an_epsilon_that_the_config_cannot_say_is_refused_too() -> None:
    """Stock classes would load the tensors of this cut, and norm by another epsilon."""
    model = zoo("falcon_h1")
    sspruner.apply(model, half(sspruner.trace(model), "head"))
    says = r"norm\.variance_epsilon is 2e-05, and 1e-05 in .*folds a factor into this norm's epsilon"
    with pytest.raises(sspruner.ModelError, match=says):
        sspruner.export(model, "never", to="hf")


def test_what_zeros_cannot_fill_is_refused(tmp_path: Path) -> None:
    projected = tiny_model()
    sspruner.apply(projected, every_state(sspruner.trace(projected)))
    gone = zoo("falcon_h1")
    sspruner.apply(gone, half(sspruner.trace(gone), "mixer"))
    for model, to in ((projected, "hf"), (projected, "hf-padded"), (gone, "hf-padded")):
        with pytest.raises(
            sspruner.ModelError, match=f"{to} cannot express this cut: .*hf-remote and sspruner express"
        ):
            sspruner.export(model, tmp_path / "out", to=to)


def test_a_wrong_padding_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the norm's weight were not scaled back."""
    model = tiny_model(heads_per_group=4)
    sspruner.apply(model, half(sspruner.trace(model), "head"))
    monkeypatch.setattr("sspruner.surgery.pad.fold_values", lambda *args: None)
    with pytest.raises(sspruner.ProofError, match="logits of two models differ"):
        padded(model)


@pytest.mark.slow
def test_the_command_line_says_what_padding_costs(tmp_path: Path) -> None:
    model = tiny_model(state=6)
    sspruner.apply(model, one_layer(model, "state"))
    source = str(sspruner.save(model, tmp_path / "model"))
    done = cli("export", source, "--out", str(tmp_path / "stock"))
    assert done.exit_code == 2
    assert "hf cannot express this cut" in done.output
    done = cli("export", source, "--to", "hf-padded", "--out", str(tmp_path / "stock"))
    assert done.exit_code == 0, done.output
    small, large = sspruner.trace(model).state_bytes, sspruner.trace(padded(model)).state_bytes
    assert f"keeps {large:,} bytes of state where the cut itself needs {small:,}" in " ".join(done.output.split())
    ids = tokens(2, 9)
    assert_same(read_back([tmp_path / "stock"], ids, tmp_path)[0], model, ids, 1e-5)
