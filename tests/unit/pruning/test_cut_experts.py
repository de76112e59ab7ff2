"""Models with experts, end to end: what stock classes load, files, offloading, refits, and what is refused by name."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import sspruner
from sspruner.errors import InputError, ModelError, PlanError
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Selection
from sspruner.surgery.mask import is_masked
from sspruner.training.gradual import Pruner, Schedule
from support.command import run as cli
from support.offloaded import TEXT, Interrupted, check_same, interrupted
from support.scoring import calibrated
from support.tiny import logits, tokens
from support.zoo import zoo

FAMILIES = ("granitemoehybrid", "jamba", "nemotron_h")
AXES = [(f, axis) for f in FAMILIES for axis in ("expert", "expert_mlp")] + [("nemotron_h", "latent")]
FIELDS = {
    ("granitemoehybrid", "expert"): "num_local_experts",
    ("granitemoehybrid", "expert_mlp"): "intermediate_size",
    ("jamba", "expert"): "num_experts",
    ("nemotron_h", "expert"): "n_routed_experts",
    ("nemotron_h", "expert_mlp"): "moe_intermediate_size",
    ("nemotron_h", "latent"): "moe_latent_size",
}


def cut(model: Any, *axes: str, layers: slice = slice(None)) -> Plan:
    """Keep the smallest possible number of the last units of every set, in all layers or some."""
    groups = {}
    for axis in axes:
        for name, group in list(sspruner.trace(model).on_axis(axis).items())[layers]:
            after = min(group.counts(), default=8)
            groups[name] = Selection(group.units, (tuple(range(group.units - after, group.units)),) * group.groups)
    return Plan(groups)


def close(one: Any, two: Any, ids: torch.Tensor | None = None) -> None:
    first, second = (logits(model, tokens() if ids is None else ids) for model in (one, two))
    assert (first - second).abs().max() <= 1e-5 * second.abs().max()


@pytest.mark.parametrize(("family", "axis"), [case for case in AXES if case in FIELDS])
def test_stock_classes_load_a_cut_of_all_layers(family: str, axis: str, tmp_path: Path) -> None:
    """The config's field has the number, and the weights lie beside it."""
    model = zoo(family)
    before = getattr(model.config, FIELDS[family, axis])
    sspruner.apply(model, cut(model, axis))
    folder = sspruner.save(model, tmp_path / "cut")
    config = json.loads((folder / "config.json").read_text())
    assert config[FIELDS[family, axis]] == getattr(model.config, FIELDS[family, axis]) < before
    assert config["sspruner"]["stock"] == {FIELDS[family, axis]: before}
    close(AutoModelForCausalLM.from_pretrained(folder).eval(), model)
    close(sspruner.load(folder)[0], model)
    if hasattr(model, "num_experts"):
        assert model.num_experts == AutoModelForCausalLM.from_pretrained(folder).num_experts


def test_in_jamba_the_widths_of_experts_and_mlps_are_one_field(tmp_path: Path) -> None:
    model = zoo("jamba")
    alone = sspruner.apply(copy.deepcopy(model), cut(model, "expert_mlp"))
    with pytest.raises(ModelError, match="intermediate_size is the width of the experts and of other layers' MLPs"):
        sspruner.export(alone, tmp_path / "stock", to="hf")
    folder = sspruner.save(alone, tmp_path / "alone")
    assert (folder / "weights" / "model.safetensors").is_file()
    close(sspruner.load(folder)[0], alone)
    both = cut(model, "expert_mlp").groups | {
        name: Selection(group.units, (tuple(range(8)),)) for name, group in sspruner.trace(model).on_axis("mlp").items()
    }
    sspruner.apply(model, Plan(both))
    folder = sspruner.export(model, tmp_path / "both", to="hf")
    assert json.loads((folder / "config.json").read_text())["intermediate_size"] == 8
    close(AutoModelForCausalLM.from_pretrained(folder).eval(), model)


@pytest.mark.parametrize(("family", "axis"), AXES)
def test_layers_that_differ_are_read_back(family: str, axis: str, tmp_path: Path) -> None:
    """No stock config can say it, and none is written; then cut again, from the folder."""
    model = zoo(family, **({"layers": "MEAEM"} if family == "nemotron_h" else {}))
    sspruner.apply(model, cut(model, axis, layers=slice(1)))
    field = FIELDS.get((family, axis), "intermediate_size")
    assert getattr(model.config, field) == getattr(zoo(family).config, field)
    folder = sspruner.save(model, tmp_path / "uneven")
    again = sspruner.load(folder)[0]
    close(again, model)
    sspruner.apply(again, cut(again, axis, layers=slice(1, None)))
    close(sspruner.load(sspruner.save(again, tmp_path / "twice"))[0], again)


def test_padding_bars_the_experts_that_it_adds(tmp_path: Path) -> None:
    """A router with a bias for the choice can have experts of zeros; one without would choose them."""
    model = zoo("nemotron_h", layers="MEAEM")
    sspruner.apply(model, cut(model, "expert", layers=slice(1)))
    folder = sspruner.export(model, tmp_path / "padded", to="hf-padded")
    close(AutoModelForCausalLM.from_pretrained(folder).eval(), model)
    granite = zoo("granitemoehybrid")
    sspruner.apply(granite, cut(granite, "expert", layers=slice(1)))
    with pytest.raises(ModelError, match="no bias that could bar an expert of zeros from the choice"):
        sspruner.export(granite, tmp_path / "no", to="hf-padded")


def test_a_mask_without_a_tensor_is_not_saved(tmp_path: Path) -> None:
    model = zoo("nemotron_h")
    sspruner.apply(model, cut(model, "expert"), mode="mask")
    close(sspruner.load(sspruner.save(model, tmp_path / "masked"))[0], model)
    granite = zoo("granitemoehybrid")
    sspruner.apply(granite, cut(granite, "expert"), mode="mask")
    with pytest.raises(ModelError, match=r"block_sparse_moe.router: no tensor that is saved could say which experts"):
        sspruner.save(granite, tmp_path / "no")
    assert is_masked(granite)
    sspruner.unmask(granite)
    folder = sspruner.save(granite, tmp_path / "dense")
    done = cli("prune", str(folder), "--axis", "expert", "--scorer", "magnitude", "--mode", "mask", "--out", "no")
    assert done.exit_code == 2
    assert "mode mask: model.layers.0.block_sparse_moe:expert: no tensor that is saved" in done.stderr


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_is_that_of_the_whole_forward(family: str) -> None:
    model, ids = zoo(family), tokens(1, 5)
    sspruner.apply(model, cut(model, "expert", "expert_mlp"))
    made = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    for length in range(5, 9):
        assert made[0, length] == logits(model, made[:, :length])[0, -1].argmax()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_an_offloaded_model_is_cut_as_in_memory(family: str, tmp_path: Path) -> None:
    """And when it is interrupted and resumed."""
    sspruner.save(zoo(family), tmp_path / "model")
    arguments: dict[str, Any] = {
        "scorer": {"expert": "reap", "expert_mlp": "wanda"},
        "axis": {"expert": 0.34, "expert_mlp": 0.5},
        "calibration": TEXT,
        "samples": 8,
    }
    results = []
    for name in ("memory", "disk"):
        model, _ = sspruner.load(tmp_path / "model", offload=tmp_path / "working" if name == "disk" else None)
        if name == "disk":
            with pytest.raises(Interrupted), interrupted(3):
                sspruner.prune(model, **arguments)
            model, _ = sspruner.load(tmp_path / "model", offload=tmp_path / "working")
        result = sspruner.prune(model, resume=name == "disk", **arguments)
        sspruner.save(result.model, tmp_path / name, result=result)
        results.append(result)
    check_same(results[1], results[0], (tmp_path / "disk", tmp_path / "memory"))


def test_in_turn_a_layer_is_scored_on_what_the_cut_ones_make() -> None:
    """The masks of the pass and the cut at its end are one model: the second layer's scores are those behind a cut."""
    model, data = zoo("granitemoehybrid"), calibrated(tokens(8))
    result = sspruner.prune(copy.deepcopy(model), "reap", axis="expert", keep=2, calibration=data)
    names = list(result.plan.groups)
    sspruner.apply(model, Plan({names[0]: result.plan.groups[names[0]]}))
    behind = sspruner.score(model, "reap", axis="expert", calibration=data).importance
    torch.testing.assert_close(result.scores.importance[names[1]], behind[names[1]], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        ({"keep": 1}, r"keep 1: .*:expert needs 2 or more \(a token takes 2 experts\); nearest: 2"),
        ({"sparsity": 0.7}, r"0.7 keeps 1 of 3 units, and 2 have to stay \(a token takes 2 experts\); .* \(keeps 2\)"),
        ({"sparsity": 0.1}, r"0.1 removes nothing from 3 units; the nearest that can be met is 0.3333 \(keeps 2\)"),
        ({"keep": 4}, r"keep 4: .* has only 3 units"),
    ],
)
def test_budgets_that_leave_too_few_experts_name_the_nearest(budget: dict[str, float], says: str) -> None:
    with pytest.raises(InputError, match=says):
        sspruner.prune(zoo("jamba"), "magnitude", axis="expert", calibration=tokens(), **budget)


@pytest.mark.parametrize("allocation", ["global", "adaptive"])
def test_layers_that_compete_keep_enough(allocation: str) -> None:
    result = sspruner.prune(
        zoo("granitemoehybrid"), "reap", axis="expert", sparsity=0.25, allocation=allocation, calibration=tokens(8)
    )
    kept = [result.plan.groups[n].after if n in result.plan.groups else 3 for n in result.scores.importance]
    assert min(kept) >= 2
    assert sum(kept) == 9


def test_plans_that_no_router_can_take() -> None:
    model = zoo("nemotron_h")
    ((name, group),) = sspruner.trace(model).on_axis("expert").items()
    assert (group.groups, group.units, group.least) == (2, 3, 2)
    for keep, says in (
        (((0, 1), (2,)), r"keeps \[1, 2\] units; every group needs the same count"),
        (((0,), (2,)), "keeps 1 units; at least 2 have to stay in each of 2 sets: a token takes 2 experts from the 1"),
    ):
        with pytest.raises(PlanError, match=says):
            sspruner.apply(model, Plan({name: Selection(3, keep)}))
    width = next(n for n in sspruner.trace(model).groups if n.endswith(":latent"))
    with pytest.raises(PlanError, match="keeps 9 units; the model's code needs a multiple of 8; the nearest is 8"):
        sspruner.apply(model, Plan({width: Selection(16, (tuple(range(9)),))}))


def test_what_experts_cannot_have_is_refused_by_name() -> None:
    model = zoo("granitemoehybrid")
    for axis in ("expert", "expert_mlp"):
        with pytest.raises(InputError, match=f"refit output: nothing to solve for on axis {axis}"):
            sspruner.prune(model, "magnitude", axis=axis, sparsity=0.34, refit="output", calibration=tokens(8))
    with pytest.raises(InputError, match="axis expert: gradual pruning sets weights to zero"):
        Pruner(model, "expert", Schedule(0.5, 0, 2, 1), 1.0, "uniform", tokens())


def test_a_masked_model_computes_each_sequence_by_itself() -> None:
    """Beside another or alone: the mask bars experts token by token."""
    model = zoo("granitemoehybrid")
    sspruner.apply(model, cut(model, "expert"), mode="mask")
    ids = tokens(2)
    together = logits(model, ids)
    for row in range(2):
        alone = logits(model, ids[row : row + 1])
        assert (together[row] - alone[0]).abs().max() <= 1e-5 * alone.abs().max()


@pytest.mark.parametrize("through", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_masked_model_are_masked_by_themselves(through: Any) -> None:
    model, ids = zoo("granitemoehybrid"), tokens()
    dense = logits(model, ids)
    sspruner.apply(model, cut(model, "expert"), mode="mask")
    masked, other = logits(model, ids), through(model)
    assert torch.equal(logits(other, ids), masked)
    sspruner.unmask(model)
    assert torch.equal(logits(model, ids), dense)
    assert torch.equal(logits(other, ids), masked)
    with torch.no_grad():
        next(other.parameters()).zero_()
    assert not torch.equal(logits(other, ids), masked)
    sspruner.unmask(through(other))
    assert torch.equal(logits(model, ids), dense)
