"""Strided windows: every token once, against an explicit loop in fp64, whatever the batch and the padding."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import sspruner
from sspruner.evaluation import paired
from sspruner.evaluation.windows import Sums, losses, measure, windows
from support.tiny import models, tiny_model, tokens

FP32 = (torch.float32,)


@st.composite
def spans(draw: st.DrawFn) -> tuple[int, int]:
    """(window, stride)"""
    window = draw(st.integers(1, 12))
    return window, draw(st.integers(1, window))


@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), spans())
def test_every_token_but_the_first_of_a_text_counts_exactly_once(lengths: list[int], span: tuple[int, int]) -> None:
    assume(max(lengths) > 1)
    window, stride = span
    texts = [1000 * i + torch.arange(n) for i, n in enumerate(lengths)]  # every token knows its place
    data = windows(texts, window, stride)
    assert sorted(data.targets[data.counted].tolist()) == sorted(t for text in texts for t in text[1:].tolist())
    assert torch.equal(data.targets[data.mask], data.tokens[data.mask] + 1)
    assert not (data.counted & ~data.mask).any()
    assert data.tokens.shape[1] <= window
    place = torch.arange(data.tokens.shape[1]).expand_as(data.tokens)
    first = data.tokens[:, :1] % 1000 == 0  # windows at the beginning of a text
    assert (place[data.counted & ~first] >= window - stride).all()
    for row, seen in zip(data.tokens, data.mask, strict=True):
        assert torch.equal(row[seen], torch.arange(int(row[0]), int(row[0]) + int(seen.sum())))


def by_hand(model: torch.nn.Module, dense: torch.nn.Module, text: torch.Tensor, window: int, stride: int) -> Sums:
    """Window by window and token by token, in fp64; which tokens are new is kept in a set."""
    rows, said = [], {0}
    for start in range(0, len(text), stride):
        read = text[start : min(start + window, len(text) - 1)]
        if said == set(range(len(text))):
            break
        p, q = (m.double()(input_ids=read[None]).logits[0].softmax(-1) for m in (dense, model))
        row = [0.0, 0, 0.0, 0]
        for i in range(len(read)):
            if start + i + 1 not in said:
                said.add(start + i + 1)
                row[0] -= math.log(q[i, text[start + i + 1]])
                row[1] += 1
                row[2] += float((p[i] * (p[i] / q[i]).log()).sum())
                row[3] += int(p[i].argmax() == q[i].argmax())
        rows.append(row)
    return Sums(*torch.tensor(rows, dtype=torch.float64).unbind(1))


@pytest.mark.slow
@given(models(dtypes=FP32), st.lists(st.integers(2, 20), min_size=1, max_size=3), spans(), st.data())
def test_sums_are_what_an_explicit_loop_says(
    model: torch.nn.Module, lengths: list[int], span: tuple[int, int], data: st.DataObject
) -> None:
    """Texts of any length, padded beside each other, in batches of any size."""
    dense = tiny_model(seed=data.draw(st.integers(0, 99)))
    texts = [tokens(1, n, seed=i)[0] for i, n in enumerate(lengths)]
    own, theirs = measure(model, windows(texts, *span), data.draw(st.integers(1, 7)), dense)
    lost = losses(model, windows(texts, *span), data.draw(st.integers(1, 7)))
    assert lost.sum(1).tolist() == pytest.approx(own.nll.tolist(), rel=1e-4)
    with torch.no_grad():
        expected = [by_hand(model, dense, text, *span) for text in texts]
    for name, rel in (("nll", 1e-3), ("tokens", 0), ("kl", 1e-2)):
        wanted = torch.cat([getattr(each, name) for each in expected]).tolist()
        assert getattr(own, name).tolist() == pytest.approx(wanted, rel=rel, abs=1e-4), name
    agreement = torch.cat([each.agreement for each in expected])
    assert (own.agreement - agreement).abs().sum() <= 1  # of two equal logits either may be the likeliest
    assert theirs is not None
    assert torch.equal(theirs.tokens, own.tokens)


@given(st.integers(2, 40), st.integers(1, 12))
def test_a_stride_of_the_window_is_plain_windows(length: int, window: int) -> None:
    model, text = tiny_model(), tokens(1, length)[0]
    own, _ = measure(model, windows([text], window, window), 3)
    with torch.no_grad():
        plain = [
            float(torch.nn.functional.cross_entropy(model(input_ids=text[None, i : i + len(part)]).logits[0], part,
                                                    reduction="sum"))
            for i, part in enumerate_parts(text[1:], window)
        ]  # fmt: skip
    assert own.nll.tolist() == pytest.approx(plain, rel=1e-4, abs=1e-4)
    assert paired.perplexity(own.nll, own.tokens).value == pytest.approx(math.exp(sum(plain) / (length - 1)), rel=1e-4)


def enumerate_parts(targets: torch.Tensor, window: int) -> list[tuple[int, torch.Tensor]]:
    return [(i, targets[i : i + window]) for i in range(0, len(targets), window)]


@given(models(dtypes=FP32), spans())
def test_a_model_against_itself(model: torch.nn.Module, span: tuple[int, int]) -> None:
    own, theirs = measure(model, windows([tokens(1, 30)[0], tokens(1, 11, seed=1)[0]], *span), 4, model)
    assert theirs is not None
    assert paired.perplexity_ratio(own.nll, theirs.nll, own.tokens) == (1, 1, 1)
    assert own.kl is not None
    assert not own.kl.any()
    assert torch.equal(own.agreement, own.tokens)


def test_what_cannot_be_windowed() -> None:
    for window, stride in ((4, 0), (4, 5), (0, 0)):
        with pytest.raises(sspruner.InputError, match="must be at least 1 and at most the window"):
            windows([torch.arange(9)], window, stride)
    for texts in ([], [torch.arange(1)], [torch.arange(0)]):
        with pytest.raises(sspruner.InputError, match="no text holds two tokens"):
            windows(texts, 4)
