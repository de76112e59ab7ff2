"""What is saved beside the tensors' values: shards and their index, generation config, tokenizer; by every writer."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

import sspruner
from sspruner.formats import checkpoint
from sspruner.formats.writers import WRITERS
from sspruner.plans.plan import Plan
from support.examples import examples
from support.tiny import half, logits, tiny_model, tokens
from support.zoo import zoo

SHARDED = [to for to in WRITERS if to not in ("mamba-ssm", "gguf", "gguf-padded")]  # these write one file
WEIGHTS = ("backbone.layers.0.mixer:state",)  # cut alone, no stock config can say it


def cut(model: Any, alone: bool) -> Any:
    """Half of the state: in all layers, or in the first alone, so that the weights are hidden from stock classes."""
    plan = half(sspruner.trace(model))
    return sspruner.apply(model, Plan({n: s for n, s in plan.groups.items() if not alone or n in WEIGHTS}))


def loaded(folder: Path, to: str) -> Any:
    return stock(folder, trust_remote_code=True) if to == "hf-remote" else sspruner.load(folder)[0]


def stock(folder: Path, **options: Any) -> Any:
    """A copy: weights that are mapped from a file may lie unaligned, and BLAS then rounds otherwise."""
    from transformers import AutoModelForCausalLM

    read, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return copy.deepcopy(read).eval()


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers copies the code of hf-remote: never the user's own cache."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def test_shards_are_at_most_5_gb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5 would write files of 50 GB. Every writer passes on the one number."""
    assert checkpoint.MAX_SHARD == "5GB"
    asked: list[Any] = []
    model = tiny_model()
    monkeypatch.setattr(model, "save_pretrained", lambda *args, **kwargs: asked.append(kwargs.get("max_shard_size")))
    monkeypatch.setattr("sspruner.io.export.padded", lambda model, *_: model)
    for to in SHARDED:
        sspruner.export(model, tmp_path / to, to=to)
    assert asked == ["5GB"] * len(SHARDED)


@pytest.mark.slow
@pytest.mark.parametrize("alone", [False, True], ids=["stock", "weights"])
@pytest.mark.parametrize("to", SHARDED)
def test_shards_are_read_back(
    to: str, alone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modules: None
) -> None:
    """The index names the files that are there, each no larger than asked; logits are equal, in stock classes, too."""
    model = cut(tiny_model(layers=2, groups=2), alone)
    whole = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    monkeypatch.setattr(checkpoint, "MAX_SHARD", "2KB")
    if to == "hf" and alone:
        with pytest.raises(sspruner.ModelError, match="hf cannot express this cut"):
            sspruner.export(model, tmp_path / "out", to=to)
        return
    folder = sspruner.export(model, tmp_path / "out", to=to)
    inner = folder / "weights" if to == "sspruner" and alone else folder
    index = json.loads((inner / "model.safetensors.index.json").read_text())["weight_map"]
    files = sorted(inner.glob("*.safetensors"))
    assert files == sorted(folder.rglob("*.safetensors"))
    assert len(files) >= whole // 2000 > 1
    assert set(index.values()) == {file.name for file in files}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
            sizes = [tensors.get_tensor(name).nbytes for name in names]
        assert {name for name, holds in index.items() if holds == file.name} == set(names)
        assert sum(sizes) <= 2000 or len(sizes) == 1
    limit = 1e-5 if to == "hf-padded" else 0.0
    expected = logits(model, tokens())
    assert (logits(copy.deepcopy(loaded(folder, to)), tokens()) - expected).abs().max() <= limit * expected.abs().max()
    if to != "hf-remote" and not (to == "sspruner" and alone):
        assert (logits(stock(folder), tokens()) - expected).abs().max() <= limit * expected.abs().max()


def test_mamba_ssm_reads_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_SHARD", "2KB")
    folder = sspruner.export(tiny_model(), tmp_path / "out", to="mamba-ssm")
    assert [path.name for path in folder.iterdir() if path.suffix in (".bin", ".safetensors")] == ["pytorch_model.bin"]


settings_of_generation = st.fixed_dictionaries(
    {},
    optional={
        "max_new_tokens": st.integers(1, 9),
        "eos_token_id": st.integers(1, 30) | st.lists(st.integers(1, 30), min_size=1, max_size=3),
        "pad_token_id": st.integers(1, 30),
        "do_sample": st.just(True),
        "temperature": st.sampled_from([0.5, 0.75]),
        "top_k": st.integers(1, 30),
        "repetition_penalty": st.sampled_from([1.25, 2.0]),
    },
)  # temperature and top_k without do_sample: published configs are like that, too


@pytest.mark.slow
@pytest.mark.ci_cover(most=3)
@pytest.mark.cover
@pytest.mark.parametrize("to", WRITERS)
@examples(10)
@given(values=settings_of_generation, alone=st.booleans())
def test_the_generation_config_goes_along(
    to: str, values: dict[str, Any], alone: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Read from a folder, as published; then cut, written by any writer, read again: the same fields."""
    folder = tmp_path_factory.mktemp("generation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "modules"))
        source = sspruner.save(tiny_model(layers=2), folder / "in")
        (source / "generation_config.json").write_text(json.dumps(values))
        model = cut(sspruner.load(source)[0], alone and to not in ("hf", "mamba-ssm"))
        before = model.generation_config.to_diff_dict()
        out = sspruner.export(model, folder / "out", to=to)
        after = loaded(out, to).generation_config.to_diff_dict()
        if to == "sspruner":
            after = sspruner.load(sspruner.save(sspruner.load(out)[0], folder / "again"))[0].generation_config
            after = after.to_diff_dict()
    assert {name: after.get(name) for name in values} == values
    kept = {"transformers_version", "_from_model_config"}
    assert {n: v for n, v in after.items() if n not in kept} == {n: v for n, v in before.items() if n not in kept}


def test_a_damaged_generation_config_of_a_native_folder_is_refused(tmp_path: Path) -> None:
    folder = sspruner.export(tiny_model(), tmp_path / "out", to="mamba-ssm")
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(sspruner.ModelError, match=r"generation_config\.json cannot be read"):
        sspruner.load(folder)


@pytest.mark.slow
@pytest.mark.parametrize("to", WRITERS)
def test_the_tokenizer_goes_along(to: str, tmp_path: Path, reference: tuple) -> None:
    """With a chat template and special tokens of its own."""
    from transformers import AutoTokenizer

    tokenizer = copy.deepcopy(reference[1])
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<|user|>"]})
    folder = sspruner.export(tiny_model(), tmp_path / "out", tokenizer, to=to)
    found = AutoTokenizer.from_pretrained(folder)
    said = [{"role": "user", "content": "Once upon a time"}]
    for way in (found, sspruner.load(folder)[1]) if to != "hf-remote" else (found,):
        assert way.apply_chat_template(said, tokenize=False) == "<|user|>Once upon a time"
        ids = way("<|user|>Once upon")["input_ids"]
        assert ids == tokenizer("<|user|>Once upon")["input_ids"]
        assert way.convert_ids_to_tokens(ids)[0] == "<|user|>"
        assert (way.pad_token, way.pad_token_id) == ("<pad>", tokenizer.pad_token_id)
        assert set(way.all_special_tokens) == set(tokenizer.all_special_tokens)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["zamba2", "nemotron_h"])
def test_shared_and_renamed_tensors_are_sharded_once(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared blocks, and names that the file has and the modules do not."""
    model = zoo(family)
    sspruner.apply(model, half(sspruner.trace(model)))
    monkeypatch.setattr(checkpoint, "MAX_SHARD", "4KB")
    folder = sspruner.save(model, tmp_path / "out")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    expected = logits(copy.deepcopy(model), tokens())
    assert torch.equal(logits(stock(folder), tokens()), expected)
    assert torch.equal(logits(copy.deepcopy(loaded(folder, "sspruner")), tokens()), expected)
