"""Save and load round-trip to equal logits and equal generation; a uniform cut loads without sspruner."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import sspruner
from sspruner.io.source import DEFAULT, REFERENCES
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Selection
from sspruner.surgery.record import fields
from support.examples import examples
from support.round_trip import GREEDY, STOCK, check_round_trip, uniform
from support.stock_process import run_stock
from support.tiny import half, logits, models, plans, tiny_model, tokens
from support.zoo import FAMILIES, zoo, zoo_models


@pytest.mark.slow
@examples(20)
@given(st.one_of(zoo_models(), models(least_state=2)), st.data())
def test_load_gives_back_what_was_saved(model: torch.nn.Module, data: st.DataObject) -> None:
    """Any config of any family, any plan on any axes, cut once or twice, or not at all; Mamba2 in bf16, too."""
    for _ in range(data.draw(st.integers(0, 2))):
        sspruner.apply(model, data.draw(plans(sspruner.trace(model))))
    with tempfile.TemporaryDirectory() as folder:
        check_round_trip(model, Path(folder) / "model")


@pytest.mark.slow
@pytest.mark.cover
@pytest.mark.parametrize("family", FAMILIES)
def test_every_axis_at_once_is_saved_and_loaded(family: str, tmp_path: Path) -> None:
    """In bf16: all in a layer is halved, the first block goes if it can; then saved, loaded, cut, saved again."""
    model = zoo(family, hidden=16, dtype=torch.bfloat16)
    graph = sspruner.trace(model)
    groups = {
        n: s for axis in graph.axes if axis not in ("block", "mixer") for n, s in half(graph, axis).groups.items()
    }
    block = graph.groups.get(f"{graph.blocks}:block")
    if block:
        groups[block.name] = Selection(block.units, (tuple(range(1, block.units)),))
    sspruner.apply(model, Plan(groups))
    loaded = check_round_trip(model, tmp_path / "one")
    sspruner.apply(loaded, uniform(loaded, (0, 2)))
    again = check_round_trip(loaded, tmp_path / "two")
    assert [Plan.from_json(cut).drops for cut in again.config.sspruner["cuts"]] == [True, True]


def test_a_loaded_model_can_be_cut_and_saved_again(tmp_path: Path) -> None:
    """Cut, save, load, cut, save, load: the record in config.json holds both cuts, each in its own indices."""
    model = tiny_model(layers=2)
    first = "backbone.layers.0.mixer:state"
    sspruner.apply(model, Plan({first: Selection(6, ((0, 2, 3, 5),))}))
    loaded, _ = sspruner.load(sspruner.save(model, tmp_path / "one"))
    sspruner.apply(loaded, Plan({first: Selection(4, ((1, 3),))}))
    again, _ = sspruner.load(sspruner.save(loaded, tmp_path / "two"))
    record = again.config.sspruner
    assert record["version"] == 1
    assert [cut["groups"] for cut in record["cuts"]] == [
        {first: {"before": 6, "after": 4, "keep": [[0, 2, 3, 5]]}},
        {first: {"before": 4, "after": 2, "keep": [[1, 3]]}},
    ]
    assert torch.equal(logits(again, tokens()), logits(loaded, tokens()))
    assert fields(again.config) == {**fields(loaded.config), "dtype": again.dtype}  # saving made its name of the dtype


def test_layers_made_equal_again_become_stock(tmp_path: Path) -> None:
    """Cut one layer, then the others to the same size: the config says so and stock classes load it."""
    from transformers import AutoModelForCausalLM

    model = tiny_model(layers=2)
    sspruner.apply(model, Plan({"backbone.layers.0.mixer:state": Selection(6, ((0, 1, 4),))}))
    assert model.config.state_size == 6
    sspruner.apply(model, Plan({"backbone.layers.1.mixer:state": Selection(6, ((1, 2, 3),))}))
    assert model.config.state_size == 3
    folder = sspruner.save(model, tmp_path / "model")
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(stock, tokens()), logits(model, tokens()))


def test_only_the_layers_that_stay_have_to_be_equal(tmp_path: Path) -> None:
    """One plan cuts two layers to one size and drops the third, which was left as it was: stock classes load it."""
    from transformers import AutoModelForCausalLM

    model = tiny_model(layers=3)
    cut = {f"backbone.layers.{i}.mixer:state": Selection(6, ((0, 1, 4),)) for i in (0, 2)}
    sspruner.apply(model, Plan({**cut, "backbone.layers:block": Selection(3, ((0, 2),))}))
    assert (model.config.state_size, model.config.num_hidden_layers) == (3, 2)
    stock = AutoModelForCausalLM.from_pretrained(sspruner.save(model, tmp_path / "model"))
    assert torch.equal(logits(stock, tokens()), logits(model, tokens()))


@pytest.mark.parametrize(
    ("family", "axis"), [("mamba2", "state"), ("bamba", "group"), ("jamba", "mlp"), ("zamba", "head")]
)
def test_an_even_cut_is_loaded_at_its_sizes(family: str, axis: str, tmp_path: Path) -> None:
    """The config says the cut sizes; the model is built at the sizes before, and cut once."""
    model = zoo(family)
    sspruner.apply(model, half(sspruner.trace(model), axis))
    loaded, _ = sspruner.load(sspruner.save(model, tmp_path / "model"))
    assert {n: p.shape for n, p in loaded.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))


@pytest.mark.slow
def test_a_uniform_cut_loads_in_a_process_that_never_imports_sspruner(tmp_path: Path) -> None:
    model = tiny_model(groups=2, layers=2)
    sspruner.apply(model, uniform(model, (0, 2, 3)))
    folder = sspruner.save(model, tmp_path / "model")
    ids = tokens(2, 9)
    result = run_stock(STOCK, str(folder), json.dumps(ids.tolist()), log=tmp_path / "read.log")
    assert result["state"] == 3
    assert torch.equal(torch.tensor(result["logits"]), logits(model, ids).double())
    assert result["made"] == model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY).tolist()


@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}], ids=str)
@pytest.mark.parametrize("axis", ["state", "head", "hidden"])
def test_stock_loading_of_a_cut_that_no_config_expresses_fails_loudly(axis: str, options: dict, tmp_path: Path) -> None:
    """Better no model than one with silently random weights."""
    from transformers import AutoModelForCausalLM

    model = tiny_model(layers=2)
    plan = half(sspruner.trace(model), axis)
    name = next(iter(plan.groups))
    sspruner.apply(model, Plan({name: plan.groups[name]}))  # one layer of two; or the hidden size, tied to heads
    folder = sspruner.save(model, tmp_path / "model")
    with pytest.raises((OSError, RuntimeError), match=r"(?i)no file named model.safetensors|mismatch"):
        AutoModelForCausalLM.from_pretrained(folder, **options)
    assert torch.equal(logits(sspruner.load(folder)[0], tokens()), logits(model, tokens()))


def test_a_masked_model_saves_zeros_at_stock_sizes(tmp_path: Path) -> None:
    model = tiny_model()
    plan = uniform(model, (0, 5))
    sspruner.apply(model, plan, mode="mask")
    saved = load_file(sspruner.save(model, tmp_path / "model") / "model.safetensors")
    bias = saved["backbone.layers.0.mixer.conv1d.bias"]
    D = model.backbone.layers[0].mixer.intermediate_size
    assert bias.shape == model.backbone.layers[0].mixer.conv1d.bias.shape
    assert bias[D : D + 6].nonzero().flatten().tolist() == [0, 5]
    loaded, _ = sspruner.load(tmp_path / "model")
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))


def test_result_files_lie_where_runtimes_do_not_look(tmp_path: Path) -> None:
    """Only weights are *.safetensors beside config.json: some servers read all of them."""
    model = tiny_model()
    result = sspruner.prune(model, "magnitude", keep=3, calibration=tokens(4, 12))
    folder = sspruner.save(model, tmp_path / "model", result=result)
    assert [p.name for p in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert Plan.load(folder / "plan.json") == result.plan
    scores = sspruner.Scores.load(folder / "sspruner" / "scores.safetensors")
    assert scores.metadata == result.scores.metadata
    assert all(torch.equal(scores.importance[n], s) for n, s in result.scores.importance.items())
    assert json.loads((folder / "report.json").read_text())["pruned"] == result.report.pruned


def test_a_record_that_does_not_fit_its_model_is_refused(tmp_path: Path) -> None:
    model = tiny_model(layers=2)
    sspruner.apply(model, Plan({"backbone.layers.0.mixer:state": Selection(6, ((0, 1, 4),))}))
    folder = sspruner.save(model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["sspruner"]["cuts"][0]["groups"] = {
        "backbone.layers.0.mixer:state": {"before": 9, "after": 2, "keep": [[0, 1]]}
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(sspruner.SSPrunerError, match=r"records a cut of backbone\.layers\.0\.mixer:state"):
        sspruner.load(folder)


@pytest.mark.parametrize(
    "record",
    [[], 3, {"version": 2, "cuts": []}, {"version": 1}, {"version": 1, "cuts": 4}, {"version": 1, "cuts": [{}]},
     {"version": 1, "groups": {"backbone.layers.0.mixer:state": {"before": 6, "after": 1, "keep": [[0]]}}}],
    ids=str,
)  # fmt: skip
def test_a_malformed_record_is_refused(record: object, tmp_path: Path) -> None:
    """The last one is what version 0.1.0 wrote. An empty record records nothing."""
    folder = sspruner.save(tiny_model(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sspruner": record}))
    if not record:
        sspruner.load(folder)
        return
    with pytest.raises(sspruner.SSPrunerError, match=r"config\.json, key 'sspruner': not a "):
        sspruner.load(folder)


def test_the_reference_model_is_the_default(reference: tuple) -> None:
    model, tokenizer = reference
    assert sspruner.trace(model).parameters == 3_841_424
    assert (
        tokenizer.decode(tokenizer("It was a dark and stormy night")["input_ids"]) == "It was a dark and stormy night"
    )
    folder = REFERENCES / DEFAULT
    assert (folder / "model.safetensors").stat().st_size < 8_000_000
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert "## Perplexity" in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("family", ["mamba2", "mamba", "zamba2"])
def test_what_is_fp32_in_a_bf16_model_comes_back_as_it_was_saved(family: str, tmp_path: Path) -> None:
    """A_log, D and dt_bias, whatever the rest is in, from disk too. A dtype that is asked for holds for all.

    Not Mamba1's D, with which transformers' own code does not run.
    """
    model = zoo(family, dtype=torch.bfloat16)
    for name, p in model.named_parameters():
        if name.endswith(("A_log", "dt_bias") if family == "mamba" else ("A_log", ".D", "dt_bias")):
            p.data = torch.randn(p.shape)
    folder = sspruner.save(model, tmp_path / "model")
    loaded, _ = sspruner.load(folder)
    found = dict(loaded.named_parameters())
    assert {p.dtype for p in found.values()} == {torch.float32, torch.bfloat16}
    for name, p in model.named_parameters():
        assert found[name].dtype == p.dtype, name
        assert torch.equal(found[name], p), name
    apart, _ = sspruner.load(folder, offload=tmp_path / "working")
    assert torch.equal(logits(apart, tokens()), logits(loaded, tokens()))
    narrow, _ = sspruner.load(folder, dtype="bfloat16")
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
