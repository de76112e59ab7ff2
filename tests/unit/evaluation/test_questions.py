"""MQAR, needles and copies: every answer is determined by what was read, and nothing else is asked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import sspruner
from sspruner.evaluation.copying import copies
from sspruner.evaluation.mqar import FILLER, GRID, distances, mqar
from sspruner.evaluation.needle import MARK, needles
from sspruner.evaluation.questions import NONE, Questions, answered, logits_after
from support.tiny import VOCABULARY, tiny_model

SEEDS = st.integers(0, 2**40)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def asked(row: torch.Tensor) -> list[int]:
    return (row != NONE).nonzero()[:, 0].tolist()


def looked_up(questions: Questions) -> torch.Tensor:
    """What followed the first occurrence of the token that is read, where something is asked: (n, T)."""
    found = torch.full_like(questions.answers, NONE)
    for n, (row, answers) in enumerate(zip(questions.tokens.tolist(), questions.answers, strict=True)):
        for t in asked(answers):
            found[n, t] = row[row.index(row[t]) + 1]
    return found


def check(questions: Questions, count: int, length: int, vocabulary: int, each: int) -> None:
    """Check shapes, the number of questions of every sequence, and that who looks things up knows all answers."""
    tokens, answers = questions.tokens, questions.answers
    assert tokens.shape == answers.shape == (count, length)
    assert tokens.dtype == answers.dtype == torch.int64
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary
    assert ((answers != NONE).sum(1) == each).all()
    assert torch.equal(looked_up(questions), answers)


@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 30), st.integers(20, 50), st.booleans(), SEEDS)
def test_mqar_asks_for_each_key_once_and_its_value_is_known(
    count: int, pairs: int, more: int, vocabulary: int, noise: bool, seed: int
) -> None:
    length = 4 * pairs + more
    questions = mqar(count, pairs, length, seeded(seed), vocabulary=vocabulary, noise=noise)
    check(questions, count, length, vocabulary, pairs)
    for row, answers in zip(questions.tokens.tolist(), questions.answers, strict=True):
        keys, values, places = row[: 2 * pairs : 2], row[1 : 2 * pairs : 2], asked(answers)
        assert len(set(keys)) == len(set(values)) == pairs
        assert all(0 < key < vocabulary // 2 <= value for key, value in zip(keys, values, strict=True))
        assert sorted(row[t] for t in places) == sorted(keys)  # each key is asked once, and stands nowhere else
        assert [t for t in range(2 * pairs, length) if row[t] in keys] == places
        assert all(t >= 2 * pairs and t % 2 == 0 for t in places)
        assert noise or all(row[t] == FILLER for t in range(2 * pairs, length) if t not in places)
    again = mqar(count, pairs, length, seeded(seed), vocabulary=vocabulary, noise=noise)
    assert torch.equal(again.tokens, questions.tokens)
    assert torch.equal(again.answers, questions.answers)


@pytest.mark.parametrize(("pairs", "length"), GRID.items())
def test_the_grid_of_mqar_has_room(pairs: int, length: int) -> None:
    assert mqar(1, pairs, length, seeded(0)).tokens.shape == (1, length)


def test_distances_follow_a_power_law() -> None:
    for power in (0.01, 1.0):
        drawn = distances(20_000, 1, 8, power, seeded(0))[:, 0]
        shares = torch.arange(1, 9.0) ** (power - 1)
        assert torch.allclose(drawn.bincount(minlength=8) / 20_000, shares / shares.sum(), atol=0.015)
    assert len(set(distances(1, 8, 8, 0.01, seeded(1))[0].tolist())) == 8  # without replacement


@given(
    st.integers(1, 4), st.integers(1, 6), st.integers(1, 40), st.none() | st.integers(1, 7),
    st.none() | st.sampled_from([0, 0.5, 1]), SEEDS,
)  # fmt: skip
def test_a_needle_occurs_once_where_it_should_and_is_asked_for_at_the_end(
    count: int, needle: int, hay: int, phrase: int | None, depth: float | None, seed: int
) -> None:
    length = hay + 2 * needle + 2
    questions = needles(count, length, 20, seeded(seed), needle=needle, phrase=phrase, depth=depth)
    check(questions, count, length, 20, needle)
    for row, answers in zip(questions.tokens.tolist(), questions.answers, strict=True):
        assert asked(answers) == list(range(length - needle - 1, length - 1))
        at, end = (t for t in range(length) if row[t] == MARK)
        words, haystack = row[end + 1 :], row[:at] + row[at + needle + 1 : end]
        assert row[at + 1 : at + 1 + needle] == words
        assert all(word >= 10 for word in words)
        assert all(0 < token < 10 for token in haystack)
        assert len(haystack) == hay
        assert depth is None or at == round(depth * hay)
        assert phrase is None or haystack == [haystack[i % phrase] for i in range(hay)]


def test_needles_lie_everywhere_if_no_depth_is_named() -> None:
    places = needles(400, 22, 20, seeded(0)).tokens.eq(MARK).int().argmax(1)
    assert set(places.tolist()) == set(range(11))


@given(st.integers(1, 4), st.integers(1, 12), st.integers(13, 40), SEEDS)
def test_a_copy_is_the_string_and_each_of_its_tokens_is_asked(
    count: int, string: int, vocabulary: int, seed: int
) -> None:
    questions = copies(count, string, vocabulary, seeded(seed))
    check(questions, count, 2 * string + 2, vocabulary, string)
    for row, answers in zip(questions.tokens.tolist(), questions.answers.tolist(), strict=True):
        assert row[: string + 1] == row[string + 1 :]
        assert row[0] == 0
        assert len(set(row)) == string + 1
        assert answers == [NONE] * (string + 1) + row[1 : string + 1] + [NONE]


class Reader(nn.Module):
    """A language model that says what it is told, (n, T): one token after each."""

    def __init__(self, said: torch.Tensor, vocabulary: int) -> None:
        super().__init__()
        self.said, self.vocabulary = said, vocabulary

    def forward(self, input_ids: torch.Tensor) -> Any:
        said, self.said = self.said.split([len(input_ids), len(self.said) - len(input_ids)])
        return SimpleNamespace(logits=30.0 * nn.functional.one_hot(said, self.vocabulary))


@given(st.integers(1, 5), st.integers(1, 4), SEEDS)
def test_answers_are_counted_where_something_is_asked_and_nowhere_else(count: int, batch: int, seed: int) -> None:
    generator = seeded(seed)
    answers = torch.randint(0, 9, (count, 6), generator=generator)
    hidden = torch.rand(count, 6, generator=generator) < 0.5
    hidden[:, 2] = False  # something is asked in every sequence
    questions = Questions(torch.zeros_like(answers), answers.masked_fill(hidden, NONE))
    said = torch.randint(0, 9, (count, 6), generator=generator)
    right, nll = answered(Reader(said, 9), questions, batch)
    for n in range(count):
        hits = [int(said[n, t]) == int(answers[n, t]) for t in range(6) if not hidden[n, t]]
        assert float(right[n]) == pytest.approx(sum(hits) / len(hits))
        assert float(nll[n]) == pytest.approx(30 * (1 - sum(hits) / len(hits)), abs=1e-5)


def test_logits_after_questions_are_those_of_the_whole_model_which_is_left_alone() -> None:
    model, questions = tiny_model(), mqar(5, 3, 16, seeded(0), vocabulary=VOCABULARY)
    where = questions.answers != NONE
    with torch.no_grad():
        whole = [model(input_ids=questions.tokens, use_cache=False).logits[where] for _ in range(2)]
        assert torch.allclose(logits_after(model, questions.tokens, where), whole[0], atol=1e-5)
        assert torch.equal(model(input_ids=questions.tokens, use_cache=False).logits[where], whole[1])
    for one, all_at_once in zip(answered(model, questions, 1), answered(model, questions), strict=True):
        assert torch.allclose(one, all_at_once, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda g: mqar(1, 5, 64, g, vocabulary=10), "5 pairs need 5 different keys; a vocabulary of 10 has 4"),
        (lambda g: mqar(1, 5, 19, g), "length 19: 5 pairs and their queries need 20 tokens"),
        (lambda g: needles(1, 11, 20, g), "length 11: a needle of 5 and the question need 12 tokens"),
        (lambda g: needles(1, 99, 8, g), "a vocabulary of 8 is too small"),
        (lambda g: copies(1, 8, 8, g), "a vocabulary of 8 is too small"),
    ],
)
def test_what_cannot_be_made_is_refused(make: Any, problem: str) -> None:
    with pytest.raises(sspruner.InputError, match=problem):
        make(seeded(0))
