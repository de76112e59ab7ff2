"""Recall and passkeys: the tasks are well formed, and who copies what it read gets everything right."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import sspruner
from sspruner.evaluation.last_word import last_words
from sspruner.evaluation.passkey import DEPTHS, passkey_text, passkeys
from sspruner.evaluation.recall import answers, recall, sequences, tasks_for
from support.tiny import VOCABULARY, tiny_model


@pytest.mark.parametrize(("trained", "pairs"), [(None, 15), (3, 3), (99, 15)])
def test_tasks_have_the_pairs_of_a_models_training_if_its_vocabulary_holds_them(trained: int, pairs: int) -> None:
    model = tiny_model()  # a vocabulary of 31: at most 15 keys, and 16 pairs where a model says nothing
    if trained:
        model.config.recall_pairs = trained
    found = tasks_for(model, 2, 5)
    assert torch.equal(found, sequences(2, pairs, VOCABULARY, torch.Generator().manual_seed(5)))


def test_a_model_that_learned_some_words_alone_is_asked_for_these() -> None:
    model = tiny_model()
    model.config.recall_pairs, model.config.recall_words = 4, 10
    found = tasks_for(model, 50, 5)
    assert (found[:, 0] == 0).all()  # the end of another text
    assert set(found[:, 1:].unique().tolist()) == set(range(1, 11))
    assert torch.equal(found[:, 1:] - 1, sequences(50, 4, 10, torch.Generator().manual_seed(5)))
    logits = torch.nn.functional.one_hot(found.roll(-1, 1), VOCABULARY).float()  # says each next token
    said, target = answers(logits, found)
    assert target.shape == (50, 4)
    assert torch.equal(said.argmax(-1), target)
    for row, values in zip(found.tolist(), target.tolist(), strict=True):
        table = dict(zip(row[1:9:2], row[2:9:2], strict=True))
        assert [table[key] for key in row[9::2]] == values


class Copier(nn.Module):
    """Says what followed the longest earlier match of what it just read, or token 0."""

    def __init__(self, vocabulary: int, longest: int) -> None:
        super().__init__()
        self.vocabulary, self.longest = vocabulary, longest

    def forward(self, input_ids: torch.Tensor) -> Any:
        logits = torch.zeros(*input_ids.shape, self.vocabulary)
        for b, row in enumerate(input_ids.tolist()):
            for t in range(len(row)):
                said = 0
                for n in range(1, self.longest + 1):
                    ends = [e for e in range(n - 1, t) if row[e - n + 1 : e + 1] == row[t - n + 1 : t + 1]]
                    said = row[ends[-1] + 1] if ends else said
                logits[b, t, said] = 30
        return SimpleNamespace(logits=logits)


@given(st.integers(1, 5), st.integers(1, 10), st.integers(20, 40), st.integers(0, 99))
def test_recall_tasks_are_well_formed(count: int, pairs: int, vocabulary: int, seed: int) -> None:
    tokens = sequences(count, pairs, vocabulary, torch.Generator().manual_seed(seed))
    assert tokens.shape == (count, 4 * pairs)
    for row in tokens.tolist():
        told, asked = row[: 2 * pairs], row[2 * pairs :]
        table = dict(zip(told[::2], told[1::2], strict=True))
        assert len(table) == pairs  # every key once
        assert all(key < vocabulary // 2 <= value < vocabulary for key, value in table.items())
        assert dict(zip(asked[::2], asked[1::2], strict=True)) == table
        assert len(set(asked[::2])) == pairs
    if pairs > 1:
        accuracy, nll = recall(Copier(vocabulary, 1), tokens, 2)
        assert accuracy.tolist() == [1] * count
        assert (nll < 1e-6).all()
    wrong, _ = recall(Copier(vocabulary, 0), tokens, 2)
    assert not wrong.any()  # token 0 is a key
    with pytest.raises(sspruner.InputError, match="need 21 different keys"):
        sequences(1, 21, vocabulary, torch.Generator())


def test_recall_counts_the_answers_alone() -> None:
    """One wrong answer of four; what is said elsewhere does not matter."""
    tokens = sequences(3, 4, 20, torch.Generator().manual_seed(0))

    class Half(Copier):
        def forward(self, input_ids: torch.Tensor) -> Any:
            logits = super().forward(input_ids).logits
            logits[:, 8::2][:, 1] = 0  # after the second query all are equal, and token 0 is said
            logits[:, :8] = logits[:, 9::2].mean()
            return SimpleNamespace(logits=logits)

    accuracy, nll = recall(Half(20, 1), tokens)
    assert accuracy.tolist() == [0.75] * 3
    assert nll.tolist() == pytest.approx([torch.tensor(20.0).log().item() / 4] * 3, rel=1e-4)


@given(st.integers(0, 60), st.floats(0, 1), st.integers(10_000, 99_999))
def test_a_passkey_stands_once_at_its_depth(sentences: int, depth: float, key: int) -> None:
    text = passkey_text(sentences, depth, key)
    asked = text.removesuffix(f" {key}")
    assert asked != text
    assert asked.count(str(key)) == 1
    before, after = asked.split(f"The pass key is {key}. Remember it.")
    counts = [
        sum(part.count(end) for end in ("green.", "blue.", "yellow.", "go.", "again.")) for part in (before, after)
    ]
    assert sum(counts) == sentences
    assert abs(counts[0] - depth * sentences) <= 0.5
    assert asked.endswith("What is the pass key? The pass key is")


def test_passkeys_fit_their_lengths_and_fill_them(reference: tuple) -> None:
    tokenizer, lengths = reference[1], (160, 300)
    asked = passkeys(tokenizer, lengths, count=3, seed=1)
    assert len(asked) == 2 * len(DEPTHS) * 3
    for i, passage in enumerate(asked):
        length = lengths[i // (3 * len(DEPTHS))]
        assert length - 12 <= len(passage.context) + len(passage.word) <= length
        text, key = tokenizer.decode(passage.context), tokenizer.decode(passage.word).strip()
        assert key.isdecimal()
        assert len(key) == 5
        assert text.count(key) == 1
        place = len(tokenizer(text[: text.index(key)])["input_ids"]) / length
        depth = DEPTHS[i // 3 % len(DEPTHS)]
        assert abs(place - (0.2 + depth * 0.7)) < 0.2, (depth, place)
    assert asked == passkeys(tokenizer, lengths, count=3, seed=1)
    assert asked != passkeys(tokenizer, lengths, count=3, seed=2)
    with pytest.raises(sspruner.InputError, match="10 tokens are too few"):
        passkeys(tokenizer, [10])


def test_who_copies_finds_every_passkey(reference: tuple) -> None:
    asked = passkeys(reference[1], [110], count=1)
    nll, hits = last_words(Copier(len(reference[1]), 5), asked)
    assert hits.all()
    assert (nll < 1e-3).all()
    assert not last_words(Copier(len(reference[1]), 0), asked)[1].any()
