"""The page of text that ships: read like a file, named in results, and its opening is the prompt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sspruner
from sspruner.calibrate.encode import PAGE, page
from support.tiny import tiny_model

OPENING = "It is a truth universally acknowledged, that a single man in possession of a good fortune"


def test_the_page_is_text_of_a_few_kilobytes() -> None:
    assert page().startswith(OPENING)
    assert 4_000 < len(page().encode()) < 16_000
    assert page().isascii()
    assert all(line.strip() == line for line in page().split("\n"))


def test_windows_are_of_the_page_and_held_out_ones_are_others() -> None:
    model, tokenizer = sspruner.load()
    data = sspruner.calibration(PAGE, model, tokenizer, samples=4, seq_len=64, held_out=3)
    assert (data.source, data.tokens.shape, data.held_out.shape) == (PAGE, (4, 64), (3, 64))
    ids = torch.tensor(tokenizer(page(), add_special_tokens=False)["input_ids"])
    every = {tuple(window.tolist()) for window in ids[: len(ids) // 64 * 64].view(-1, 64)}
    drawn = [tuple(window.tolist()) for window in torch.cat([data.tokens, data.held_out])]
    assert set(drawn) <= every
    assert len(set(drawn)) == 7


def test_the_prompt_is_the_opening_of_the_page() -> None:
    model, tokenizer = sspruner.load()
    result = sspruner.prune(model, "magnitude", keep=64, calibration=PAGE, tokenizer=tokenizer, samples=2, seq_len=32)
    prompt = " ".join(result.report.continuation["prompt"].split())
    assert OPENING.startswith(prompt[: len(OPENING)])
    assert len(prompt) > 40


def test_the_prompt_of_other_text_begins_with_a_whole_word(tmp_path: Path) -> None:
    words = ["unconstitutionally", "misrepresentations", "counterbalancing", "disproportionate"]
    (tmp_path / "text.txt").write_text(" ".join(words[i % 4] for i in range(400)))
    model, tokenizer = sspruner.load()
    how = {"tokenizer": tokenizer, "samples": 2, "seq_len": 31}
    result = sspruner.prune(model, "magnitude", keep=64, calibration=str(tmp_path / "text.txt"), **how)
    assert result.report.continuation["prompt"].split()[0] in words


def test_a_model_without_a_tokenizer_cannot_read_it() -> None:
    with pytest.raises(sspruner.InputError, match="needs a tokenizer"):
        sspruner.calibration(PAGE, tiny_model())
