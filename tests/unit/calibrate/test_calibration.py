"""Calibration sources: windows, held-out text, padding, sampling from the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sspruner
from sspruner.calibrate.sources import with_more
from sspruner.recipes.parts import CalibrationText
from support.tiny import VOCABULARY, models, tiny_model, tokens
from support.zoo import FAMILIES, zoo


class Letters:
    """A tokenizer of one token per character, modulo the vocabulary."""

    def __call__(self, text: str | list[str], add_special_tokens: bool = False) -> dict:
        if isinstance(text, list):
            return {"input_ids": [self(t)["input_ids"] for t in text]}
        return {"input_ids": [ord(c) % VOCABULARY for c in text]}


MODEL = tiny_model()


@settings(max_examples=100)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 12))
def test_observed_and_held_out_never_overlap(rows: int, samples: int, held_out: int) -> None:
    ids = torch.arange(rows * 2).view(rows, 2) % VOCABULARY
    data = sspruner.calibration(ids, MODEL, samples=samples, held_out=held_out)
    assert 1 <= len(data.tokens) <= samples
    assert data.held_out_is_separate == (rows > 1 and held_out > 0)
    if data.held_out_is_separate:
        assert 1 <= len(data.held_out) <= held_out
        assert len(data.tokens) + len(data.held_out) <= rows
        assert torch.equal(data.held_out, ids[rows - len(data.held_out) :])  # the end of what was given
        assert torch.equal(data.tokens, ids[: len(data.tokens)])
    if rows >= samples + held_out:
        assert (len(data.tokens), len(data.held_out)) == (samples, held_out if held_out else 1)


def test_a_file_gives_seeded_windows_without_overlap(tmp_path: Path) -> None:
    text = "".join(chr(97 + i % 26) for i in range(1000))
    (tmp_path / "book.txt").write_text(text)
    ids = torch.tensor(Letters()(text)["input_ids"])[:990].view(-1, 10)
    same = [sspruner.calibration(tmp_path / "book.txt", MODEL, Letters(), samples=5, seq_len=10, held_out=3, seed=s)
            for s in (0, 0, 1)]  # fmt: skip
    every = torch.cat([same[0].tokens, same[0].held_out])
    assert every.shape == (8, 10)
    assert all((window == ids).all(1).any() for window in every)
    assert torch.equal(same[0].tokens, same[1].tokens)
    assert not torch.equal(same[0].tokens, same[2].tokens)


def test_strings_are_padded_and_masked() -> None:
    texts = ["a longer text here", "short", "", "x", "a middle one", "another of them", "and one more"]
    data = sspruner.calibration(texts, MODEL, Letters(), samples=9, seq_len=12, held_out=1)
    lengths = [12, 5, 12, 12]  # those of at least two tokens, truncated to seq_len; the last is held out
    assert data.mask.sum(1).tolist() == lengths
    for row, text in zip(data.tokens, ["a longer text here", "short", "a middle one", "another of them"], strict=True):
        ids = Letters()(text)["input_ids"][:12]
        assert row[: len(ids)].tolist() == ids


def test_a_mask_may_come_with_tokens() -> None:
    mask = torch.ones(4, 9, dtype=torch.bool)
    mask[:, -2:] = False
    data = sspruner.calibration(tokens(4, 9), MODEL, mask=mask, samples=3, held_out=1)
    assert data.mask.sum() == 21
    with pytest.raises(sspruner.InputError, match=r"mask has shape \(4, 8\), its tokens \(4, 9\)"):
        sspruner.calibration(tokens(4, 9), MODEL, mask=mask[:, 1:])
    with pytest.raises(sspruner.InputError, match="leaves no token"):
        sspruner.calibration(tokens(4, 9), MODEL, mask=torch.zeros(4, 9, dtype=torch.bool))


@given(models(), st.integers(0, 99))
def test_sampling_is_seeded_and_stays_in_the_vocabulary(model: torch.nn.Module, seed: int) -> None:
    model.train()
    one, two = (sspruner.calibration("self", model, samples=3, seq_len=9, held_out=2, seed=seed) for _ in range(2))
    assert one.tokens.shape == (3, 9)
    assert one.held_out.shape == (2, 9)
    assert torch.equal(one.tokens, two.tokens)
    assert (one.tokens >= 0).all()
    assert (one.tokens < VOCABULARY).all()
    assert (one.tokens[:, 0] == model.config.bos_token_id).all()
    assert model.training


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_draws_what_the_whole_model_says(family: str) -> None:
    """Step by step with the family's own cache: the same draws as from a forward over everything so far."""
    model = zoo(family)
    data = sspruner.calibration("self", model, samples=3, seq_len=12, held_out=1)
    tokens_so_far, generator = torch.zeros(4, 1, dtype=torch.long), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(11):
            last = model(input_ids=tokens_so_far, use_cache=False).logits[:, -1].softmax(-1)
            tokens_so_far = torch.cat([tokens_so_far, last.multinomial(1, generator=generator)], 1)
    assert torch.equal(torch.cat([data.tokens, data.held_out]), tokens_so_far)


def test_sampling_follows_the_models_distribution() -> None:
    """The second tokens are distributed as the model says after BOS: chi-square, 30 degrees of freedom."""
    model = tiny_model(layers=1)
    data = sspruner.calibration("self", model, samples=4000, seq_len=2, held_out=1)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[0]])).logits[0, -1].softmax(-1) * 4000
    counted = torch.bincount(data.tokens[:, 1], minlength=VOCABULARY)
    statistic = float(((counted - expected) ** 2 / expected.clamp_min(1e-3)).sum())
    assert statistic < 80  # p = 2e-6


@pytest.mark.parametrize("bad", [VOCABULARY, 10**6, -1])
def test_ids_outside_the_vocabulary(bad: int) -> None:
    ids = tokens(3, 9)
    ids[1, 4] = bad
    with pytest.raises(sspruner.InputError, match=f"token id {bad} outside the vocabulary \\(0 to {VOCABULARY - 1}\\)"):
        sspruner.calibration(ids, MODEL)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (torch.zeros(3, dtype=torch.long), {}, r"shape \(3,\); expected \(sequences, tokens >= 2\)"),
        (torch.zeros(0, 5, dtype=torch.long), {}, r"shape \(0, 5\)"),
        ([" ", ""], {}, "strings: empty"),
        (["a", "b"], {}, "every one is shorter than 2 tokens"),
        ("self", {"samples": 0}, "samples=0"),
        ("self", {"seq_len": 1}, "seq_len=1"),
        ("self", {"held_out": -1}, "held_out=-1"),
        ("missing.txt", {}, "missing.txt: no such file"),
    ],
)
def test_sources_that_are_refused(source: object, options: dict, message: str) -> None:
    with pytest.raises(sspruner.InputError, match=message):
        sspruner.calibration(source, MODEL, Letters(), **options)


def test_text_without_a_tokenizer() -> None:
    with pytest.raises(sspruner.InputError, match="needs a tokenizer and this model has none"):
        sspruner.calibration(["some text"], MODEL)


def test_progress_is_reported() -> None:
    seen: list[tuple[str, int, int]] = []
    model = tiny_model(layers=2)
    sspruner.prune(model, "ghost", sparsity=0.5, samples=2, seq_len=5, progress=lambda *step: seen.append(step))
    phases = {phase for phase, _, _ in seen}
    assert "sampling calibration text" in phases
    assert {f"scoring backbone.layers.{i}" for i in range(2)} <= phases
    assert all(0 <= done <= total for _, done, total in seen)


@settings(max_examples=60)
@given(rows=st.integers(2, 70), samples=st.integers(1, 12), more=st.integers(0, 30), text=st.booleans())
def test_text_for_a_refit_changes_neither_what_is_scored_nor_what_is_held_out(
    rows, samples, more, text, tmp_path_factory
):
    """The refit reads what is scored and the rest, and nothing that is held out; of tokens as of a running text."""
    source: Any = torch.arange(rows * 3).view(rows, 3) % VOCABULARY
    if text:
        source = tmp_path_factory.mktemp("text") / "text.txt"
        source.write_text("".join(chr(65 + i % 57) for i in range(rows * 3)))
    plain = sspruner.calibration(source, MODEL, Letters(), samples=samples, seq_len=3)
    scored, all_ = with_more(source, MODEL, Letters(), CalibrationText(samples=samples, seq_len=3), more, 0)
    assert torch.equal(scored.tokens, plain.tokens)
    assert torch.equal(scored.held_out, plain.held_out)
    assert torch.equal(all_.held_out, plain.held_out)
    assert torch.equal(all_.tokens[: len(plain.tokens)], plain.tokens)
    assert len(all_.tokens) == len(plain.tokens) + min(more, rows - len(plain.tokens) - len(plain.held_out))
    other = {tuple(row) for row in all_.tokens[len(plain.tokens) :].tolist()}
    held = {tuple(row) for row in plain.held_out.tolist()}
    assert rows > VOCABULARY or not other & held  # windows repeat in a longer text
