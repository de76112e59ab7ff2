"""The export hf-remote loads in transformers alone, in a fresh process without sspruner: equal logits, equal text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sspruner
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Selection
from sspruner.testing.plans import directions
from support.command import run as cli
from support.projected import PROJECTED, every_state
from support.round_trip import GREEDY
from support.stock_process import run_stock
from support.tiny import half, logits, tiny_model, tokens
from support.zoo import zoo

READ = """
import copy, json, sys
import torch
from transformers import AutoModelForCausalLM
def load(folder):  # a copy: weights that are mapped from a file may lie unaligned, and BLAS then rounds otherwise
    return copy.deepcopy(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)).eval()
model = load(sys.argv[1])
ids = torch.tensor(json.loads(sys.argv[2]))
with torch.no_grad():
    logits = model(input_ids=ids, use_cache=False).logits
made = model.generate(ids, attention_mask=torch.ones_like(ids), **json.loads(sys.argv[3]))
again = sys.argv[1] + "-again"
model.save_pretrained(again)
back = load(again)
with torch.no_grad():
    same = torch.equal(back(input_ids=ids, use_cache=False).logits, logits)
dtypes = sorted({str(p.dtype) for n, p in model.named_parameters() if "state_" in n})
print(json.dumps({"logits": logits.double().tolist(), "made": made.tolist(), "same": same, "dtypes": dtypes}))
"""


def read_back(folder: Path, ids: torch.Tensor, home: Path) -> dict[str, Any]:
    arguments = [str(folder), json.dumps(ids.tolist()), json.dumps(GREEDY)]
    found: dict[str, Any] = run_stock(READ, *arguments, log=home / "read.log")
    return found


def check_export(model: Any, tmp_path: Path) -> dict[str, Any]:
    ids = tokens(2, 9)
    folder = sspruner.export(model, tmp_path / "out", to="hf-remote")
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors", ".py", ".md"}
    assert "sspruner" not in json.loads((folder / "config.json").read_text())
    found = read_back(folder, ids, tmp_path)
    assert torch.equal(torch.tensor(found["logits"]), logits(model, ids).double())
    assert found["made"] == model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY).tolist()
    assert found["same"]
    return found


@pytest.mark.exhaustive
@pytest.mark.ci_cover(families=1)
@pytest.mark.slow
@pytest.mark.parametrize("family", PROJECTED)
def test_projected_states_of_every_family(family: str, tmp_path: Path) -> None:
    model = zoo(family)
    check_export(sspruner.apply(model, every_state(sspruner.trace(model))), tmp_path)


@pytest.mark.slow
def test_projections_beside_other_cuts_and_other_sizes_by_layer(tmp_path: Path) -> None:
    """In bf16, where encode and decode stay fp32."""
    model = tiny_model(groups=2, state=6, layers=3, bias=True, dtype=torch.bfloat16)
    graph = sspruner.trace(model)
    plan = directions(half(graph), graph, 0)
    del plan.groups["backbone.layers.2.mixer:state"]
    heads = {n: s for n, s in half(graph, "head").groups.items() if ".0." in n}
    found = check_export(sspruner.apply(model, Plan(plan.groups | heads)), tmp_path)
    assert found["dtypes"] == ["torch.float32"]


@pytest.mark.ci_cover(most=1)
@pytest.mark.slow
@pytest.mark.parametrize(("family", "axis"), [("mamba2", "head_dim"), ("mamba", "channel"), ("jamba", "mlp")])
def test_any_sizes_are_expressed(family: str, axis: str, tmp_path: Path) -> None:
    """Half of one axis, in the first layer only: no stock config can say it."""
    model = zoo(family)
    plan = half(sspruner.trace(model), axis)
    name = next(iter(plan.groups))
    check_export(sspruner.apply(model, Plan({name: plan.groups[name]})), tmp_path)


@pytest.mark.slow
def test_layers_with_different_experts_are_expressed(tmp_path: Path) -> None:
    """A router's bias for the choice, a buffer that is saved, has another size in every layer."""
    model = zoo("nemotron_h", layers="MEAEM")
    groups = list(sspruner.trace(model).on_axis("expert").values())
    keep = {groups[0].name: Selection(3, ((0, 2), (1, 2)))}
    keep |= {n: s for n, s in half(sspruner.trace(model), "expert_mlp").groups.items() if ".3." in n}
    check_export(sspruner.apply(model, Plan(keep)), tmp_path)


@pytest.mark.slow
def test_a_bias_that_a_cut_added_is_exported(tmp_path: Path) -> None:
    model = tiny_model(bias=False)
    name = f"{sspruner.trace(model).layers[0].path}.out_proj"
    assert model.get_submodule(name).bias is None
    new = torch.arange(float(len(model.get_parameter(f"{name}.weight"))))
    plan = Plan(half(sspruner.trace(model)).groups, updates={f"{name}.bias": new})
    check_export(sspruner.apply(model, plan), tmp_path)


def test_sspruner_does_not_read_an_export_without_trust(tmp_path: Path) -> None:
    folder = sspruner.export(tiny_model(), tmp_path / "out", to="hf-remote")
    with pytest.raises(sspruner.ModelError, match=r"config cannot be read: it needs code of its own, which is not run"):
        sspruner.load(folder)


def test_without_trust_it_is_not_read_as_something_else(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model()
    sspruner.apply(model, every_state(sspruner.trace(model)))
    folder = sspruner.export(model, tmp_path / "out", to="hf-remote")
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


def test_what_cannot_be_exported_is_refused_with_the_reason(tmp_path: Path) -> None:
    model = zoo("falcon_h1")
    sspruner.apply(model, half(sspruner.trace(model), "mixer"))
    with pytest.raises(sspruner.ModelError, match=r"cannot express this cut: module .* alone; sspruner\.load reads"):
        sspruner.export(model, tmp_path / "out", to="hf-remote")
    model = tiny_model()
    sspruner.apply(model, half(sspruner.trace(model)), mode="mask")
    with pytest.raises(sspruner.ModelError, match="is masked"):
        sspruner.export(model, tmp_path / "out", to="hf-remote")
    with pytest.raises(sspruner.InputError, match="--to pickle: unknown target; known: hf, hf-remote"):
        sspruner.export(tiny_model(), tmp_path / "out", to="pickle")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_line(tmp_path: Path) -> None:
    model = tiny_model()
    sspruner.apply(model, every_state(sspruner.trace(model)))
    source = str(sspruner.save(model, tmp_path / "model"))
    done = cli("export", source, "--to", "hf-remote", "--out", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "modeling_pruned.py").is_file()
    found = read_back(tmp_path / "out", tokens(2, 9), tmp_path)
    assert torch.equal(torch.tensor(found["logits"]), logits(model, tokens(2, 9)).double())
