"""Save and load round-trip to equal logits and equal generation; a uniform cut loads without sspruner."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import logits, models, plans, tiny_model, tokens

import sspruner
from sspruner.planning.plan import Plan, Selection

GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def uniform(model: torch.nn.Module, keep: tuple[int, ...]) -> Plan:
    groups = sspruner.trace(model).on_axis("state")
    return Plan("state", {n: Selection(g.units, (keep,) * g.groups) for n, g in groups.items()})


@settings(max_examples=20)
@given(st.data())
def test_load_gives_back_what_was_saved(data: st.DataObject) -> None:
    """Any config, any plan, cut once or twice, bf16 and fp32: every bit, every attribute, every generated token."""
    model = data.draw(models())
    for _ in range(data.draw(st.integers(0, 2))):
        sspruner.apply(model, data.draw(plans(sspruner.trace(model))))
    with tempfile.TemporaryDirectory() as folder:
        loaded, tokenizer = sspruner.load(sspruner.save(model, Path(folder) / "model"))
    assert tokenizer is None
    assert {n: p.dtype for n, p in loaded.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}
    assert all(torch.equal(p, loaded.get_parameter(n)) for n, p in model.named_parameters())
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))
    ids = tokens(2, 9)
    for beams in (1, 2):
        args = {**GREEDY, "num_beams": beams, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(loaded.generate(ids, **args), model.generate(ids, **args))
    assert str(sspruner.trace(loaded)) == str(sspruner.trace(model))


def test_a_loaded_model_can_be_cut_and_saved_again(tmp_path: Path) -> None:
    """Cut, save, load, cut, save, load: the record in config.json composes to the original model's indices."""
    model = tiny_model(layers=2)
    first = "backbone.layers.0.mixer:state"
    sspruner.apply(model, Plan("state", {first: Selection(6, ((0, 2, 3, 5),))}))
    loaded, _ = sspruner.load(sspruner.save(model, tmp_path / "one"))
    sspruner.apply(loaded, Plan("state", {first: Selection(4, ((1, 3),))}))
    again, _ = sspruner.load(sspruner.save(loaded, tmp_path / "two"))
    assert again.config.sspruner["groups"][first] == {"before": 6, "after": 2, "keep": [[2, 5]]}
    assert torch.equal(logits(again, tokens()), logits(loaded, tokens()))


def test_layers_made_equal_again_become_stock(tmp_path: Path) -> None:
    """Cut one layer, then the others to the same size: the config says so and stock classes load it."""
    from transformers import AutoModelForCausalLM

    model = tiny_model(layers=2)
    sspruner.apply(model, Plan("state", {"backbone.layers.0.mixer:state": Selection(6, ((0, 1, 4),))}))
    assert model.config.state_size == 6
    sspruner.apply(model, Plan("state", {"backbone.layers.1.mixer:state": Selection(6, ((1, 2, 3),))}))
    assert model.config.state_size == 3
    folder = sspruner.save(model, tmp_path / "model")
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(stock, tokens()), logits(model, tokens()))


STOCK = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
folder, ids = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
with torch.no_grad():
    logits = model(input_ids=ids, use_cache=False).logits
made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False,
                      pad_token_id=0)
assert not any(name.split(".")[0].startswith("sspruner") for name in sys.modules), "sspruner was imported"
print(json.dumps({"logits": logits.double().tolist(), "made": made.tolist(), "state": model.config.state_size}))
"""


def test_a_uniform_cut_loads_in_a_process_that_never_imports_sspruner(tmp_path: Path) -> None:
    model = tiny_model(groups=2, layers=2)
    sspruner.apply(model, uniform(model, (0, 2, 3)))
    folder = sspruner.save(model, tmp_path / "model")
    ids = tokens(2, 9)
    command = [sys.executable, "-c", STOCK, str(folder), json.dumps(ids.tolist())]
    out = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    result = json.loads(out.stdout.splitlines()[-1])
    assert result["state"] == 3
    assert torch.equal(torch.tensor(result["logits"]), logits(model, ids).double())
    assert result["made"] == model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY).tolist()


def test_stock_loading_of_a_per_layer_cut_fails_loudly(tmp_path: Path) -> None:
    """Better no model than one with silently random weights."""
    from transformers import AutoModelForCausalLM

    model = tiny_model(layers=2)
    sspruner.apply(model, Plan("state", {"backbone.layers.0.mixer:state": Selection(6, ((0, 1, 4),))}))
    folder = sspruner.save(model, tmp_path / "model")
    with pytest.raises(RuntimeError, match=r"(?i)size mismatch|mismatched"):
        AutoModelForCausalLM.from_pretrained(folder)


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
    sspruner.apply(model, Plan("state", {"backbone.layers.0.mixer:state": Selection(6, ((0, 1, 4),))}))
    folder = sspruner.save(model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["sspruner"]["groups"] = {"backbone.layers.0.mixer:state": {"before": 9, "after": 2, "keep": [[0, 1]]}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(sspruner.SSPrunerError, match=r"records a cut of backbone\.layers\.0\.mixer:state"):
        sspruner.load(folder)


def test_the_reference_model_is_the_default(reference: tuple) -> None:
    model, tokenizer = reference
    assert sspruner.trace(model).parameters == 3_841_424
    assert (
        tokenizer.decode(tokenizer("It was a dark and stormy night")["input_ids"]) == "It was a dark and stormy night"
    )
    folder = Path(sspruner.__file__).parent / "reference"
    assert (folder / "model.safetensors").stat().st_size < 8_000_000
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert "## Perplexity" in (folder / "README.md").read_text(encoding="utf-8")
