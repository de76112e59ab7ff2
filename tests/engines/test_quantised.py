"""Cut, save in stock shape, quantise, save, load: by torchao and llm-compressor in their own environment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import sspruner
from sspruner.io.source import DEFAULT, REFERENCES
from support.engines import needs, run

WORST = {"int8": 1e-3, "int4": 0.05}  # nats per token to the cut model


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference model with half of its states, in stock shape; and the tokens to measure on."""
    folder = tmp_path_factory.mktemp("quantised")
    model, tokenizer = sspruner.load()
    result = sspruner.prune(model, "magnitude", sparsity=0.5, samples=2, seq_len=32, tokenizer=tokenizer)
    result.save(folder / "cut")
    text = "It was the best of times, and the house on the hill had been empty for as long as anyone could say. " * 8
    ids = torch.tensor(tokenizer(text)["input_ids"])[: 2 * 64].view(2, 64)
    (folder / "tokens.json").write_text(json.dumps(ids.tolist()), encoding="utf-8")
    return folder


@needs("quant")
@pytest.mark.slow
@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("library", ["torchao", "compressed"])
def test_a_cut_model_is_quantised_saved_and_loaded(cut: Path, library: str, bits: str) -> None:
    out = cut / f"{library}-{bits}"
    shown = run("quant", "quantise.py", str(cut / "cut"), str(REFERENCES / DEFAULT), str(cut / "tokens.json"),
                f"{library}-{bits}", str(out))  # fmt: skip
    found = json.loads(shown.splitlines()[-1])
    to_cut, to_dense, of_cut = (
        found[f"kl_of_{what}"] for what in ("quantised_to_cut", "quantised_to_dense", "cut_to_dense")
    )
    assert 0 < to_cut < WORST[bits]
    assert (
        of_cut - 1e-3 < to_dense < of_cut + 2 * WORST[bits] + of_cut
    )  # beside the cut's own damage, not instead of it
    assert found["saved_is_in_memory"] in (True, None)
    _, of_cut_bytes, of_quantised = found["bytes"]
    assert of_quantised < 0.75 * of_cut_bytes  # the embedding, a quarter of the parameters, stays bf16
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["state_size"] == 64
    assert config["quantization_config"]["quant_method"] == {"compressed": "compressed-tensors"}.get(library, library)
