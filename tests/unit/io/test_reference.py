"""The reference models that ship: small, whole, described truly, and trained."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import sspruner
from sspruner.evaluation.damage import log_probabilities
from sspruner.io.source import REFERENCES

NAMES = sorted(path.name for path in REFERENCES.iterdir() if path.is_dir())
SEQ_LEN = 128

every_model = pytest.mark.parametrize("name", NAMES)


def test_one_of_each_kind() -> None:
    kinds = {json.loads((REFERENCES / name / "config.json").read_text())["model_type"] for name in NAMES}
    assert kinds == {"mamba2", "zamba2", "mamba", "qwen3_5_text"}


@every_model
def test_the_card_is_true(name: str) -> None:
    """Parameters and bytes of state on the card are those of the model, which is a plain bf16 folder under 8 MB."""
    model, tokenizer = sspruner.load(name)
    graph = sspruner.trace(model)
    card = (REFERENCES / name / "README.md").read_text(encoding="utf-8")
    assert f"| {graph.parameters:,} |" in card
    assert f"{graph.state_bytes:,} bytes" in card
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert (REFERENCES / name / "model.safetensors").stat().st_size < 8_000_000
    assert 1_000_000 < graph.parameters < 4_000_000
    assert len(tokenizer) == model.config.vocab_size


@every_model
def test_a_folder_of_that_name_goes_first(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(sspruner.InputError, match=r"no config\.json"):
        sspruner.load(name)


@torch.no_grad()
def perplexity(model: Any, windows: torch.Tensor) -> float:
    """windows: int64 (W, T)."""
    logp = log_probabilities(model, windows, torch.ones_like(windows))  # (W, T-1, V)
    return math.exp(-logp.gather(-1, windows[:, 1:, None]).double().mean())


@pytest.mark.ci_cover(most=1)
@pytest.mark.slow
@every_model
def test_it_has_learned_its_language(name: str, data_folder: Path) -> None:
    """On books that it never saw it is far better than the frequencies of single tokens, and GHOST than chance."""
    model, tokenizer = sspruner.load(name, dtype="float32")
    text = (data_folder / "books-test.txt").read_text(encoding="utf-8")[:200_000]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    windows = ids[: 12 * SEQ_LEN].view(-1, SEQ_LEN)
    frequency = torch.bincount(ids, minlength=len(tokenizer)).double() + 1
    unigram = math.exp(-(frequency / frequency.sum())[windows[:, 1:]].log().mean())
    dense = perplexity(model, windows)
    assert dense < unigram / (2 if name == "gdn-dictionaries" else 4)  # which has two layers, for its dictionaries

    calibration = ids[-8 * SEQ_LEN :].view(-1, SEQ_LEN)
    damaged = {}
    for scorer in ("ghost", "random"):
        sspruner.prune(model, scorer, sparsity=0.75, mode="mask", calibration=calibration)
        damaged[scorer] = perplexity(model, windows)
        sspruner.unmask(model)
    assert dense * 0.99 < damaged["ghost"] < damaged["random"]
