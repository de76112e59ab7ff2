"""LAMBADA's last word: against one passage at a time in fp64, models that know everything or nothing, tokens that
hold a part of the word, and what batches and padding must not change."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import sspruner
from sspruner.evaluation.last_word import last_word_accuracy, last_words, passages
from support.tiny import VOCABULARY, models, tiny_model

LETTERS = "abcdefgh \n,."
TEXTS = [
    "a bad cab",
    "he had a cage, a cafe, a bag",
    "gab",
    " fed",
    "dead beef\n\nfeed",
    "a b c d e f g h ",
    "bad, a\tface.",
]


class Letters:
    """One token per character: every last word has several, its white space among them."""

    merged: tuple[str, ...] = ()

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        ids = []
        while text:
            piece = next((m for m in self.merged if text.startswith(m)), text[0])
            ids.append(len(LETTERS) + 1 + self.merged.index(piece) if piece in self.merged else LETTERS.find(piece) + 1)
            text = text[len(piece) :]
        return {"input_ids": ids}


class Merging(Letters):
    """Also has tokens that reach over the border of two words."""

    merged = (", a", ". ")


class Oracle(nn.Module):
    """Gives each true next token probability `sure`, but for the targets at `misses`: there the one after it."""

    def __init__(
        self, sure: float = 1.0, misses: Any = lambda tokens: torch.zeros_like(tokens, dtype=torch.bool)
    ) -> None:
        super().__init__()
        self.sure, self.misses, self.seen = sure, misses, []

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        self.seen += [row[seen.bool()].tolist() for row, seen in zip(input_ids, attention_mask, strict=True)]
        targets = input_ids.roll(-1, 1) + self.misses(input_ids).roll(-1, 1)
        logits = torch.full((*input_ids.shape, VOCABULARY), (1 - self.sure) / (VOCABULARY - 1))
        return SimpleNamespace(logits=logits.scatter(-1, targets[..., None], self.sure).log())


def words_by_hand(text: str) -> tuple[str, str]:
    """(context, last word with the white space before it), letter by letter."""
    text = text.rstrip()
    start = len(text)
    while not text[start - 1].isspace():
        start -= 1
    while text[start - 1].isspace():
        start -= 1
    return text[:start], text[start:]


def by_hand(model: nn.Module, text: str, max_length: int) -> tuple[float, bool]:
    """-log p(last word) and whether each token is the likeliest, one forward per token, in fp64. For Letters."""
    context, word = (Letters()(part, False)["input_ids"] for part in words_by_hand(text))
    whole = (context + word)[-max_length:]
    nll, correct = 0.0, True
    for at in range(len(whole) - len(word), len(whole)):
        with torch.no_grad():
            p = model(input_ids=torch.tensor([whole[:at]])).logits[0, -1].double().softmax(-1)
        nll -= math.log(p[whole[at]])
        correct = correct and int(p.argmax()) == whole[at]
    return nll, correct


WORDS = st.lists(st.text("abcdefgh,.", min_size=1, max_size=5), min_size=2, max_size=7)


@given(models(dtypes=(torch.float32,)), st.lists(WORDS, min_size=1, max_size=5), st.data())
def test_any_batch_of_any_passages_is_what_one_at_a_time_says(
    model: nn.Module, drawn: list[list[str]], data: st.DataObject
) -> None:
    gaps = st.sampled_from([" ", "\n", "  ", "\n\n"])
    texts = ["".join(w + data.draw(gaps) for w in words) for words in drawn]
    size, longest = data.draw(st.integers(1, 6)), data.draw(st.integers(8, 40))
    nll, correct = last_words(model, passages(Letters(), texts, max_length=longest), size)
    expected = [by_hand(model.double(), text, longest) for text in texts]
    assert nll.tolist() == pytest.approx([n for n, _ in expected], rel=1e-3, abs=1e-3)
    assert correct.tolist() == [c for _, c in expected]
    result = last_word_accuracy(model.float(), Letters(), texts, max_length=longest, batch_size=size)
    assert result.passages == len(texts)
    assert result.accuracy == pytest.approx(sum(c for _, c in expected) / len(texts))
    assert result.nll == pytest.approx(sum(n for n, _ in expected) / len(texts), rel=1e-3, abs=1e-3)


def several(texts: list[str] = TEXTS) -> list[str]:
    """Those with a context."""
    return [t for t in texts if len(t.split()) > 1]


def test_a_model_that_knows_everything_and_models_that_miss_one_token() -> None:
    """Only tokens of the last word count, and every one of them does."""
    texts = several()
    asked = passages(Letters(), texts)
    ends = {p.context + p.word: len(p.context) for p in asked}

    def miss(offset_from_end_of_context: int) -> Any:
        def misses(tokens: torch.Tensor) -> torch.Tensor:
            wrong = torch.zeros_like(tokens, dtype=torch.bool)
            for row, hit in zip(tokens.tolist(), wrong, strict=True):
                start = next(n for whole, n in ends.items() if row[: len(whole)] == list(whole))
                hit[start + offset_from_end_of_context] = True
            return wrong

        return misses

    assert last_word_accuracy(Oracle(), Letters(), texts).accuracy == 1
    assert last_word_accuracy(Oracle(), Letters(), texts).nll == pytest.approx(0, abs=1e-6)
    for offset, accuracy in ((-1, 1), (0, 0), (1, 0)):
        result = last_word_accuracy(Oracle(misses=miss(offset)), Letters(), texts, batch_size=1)
        assert result.accuracy == accuracy, offset
    sure = last_word_accuracy(Oracle(0.5), Letters(), texts)
    assert sure.accuracy == 1
    assert sure.nll == pytest.approx(math.log(2) * sum(len(words_by_hand(t)[1]) for t in texts) / len(texts), rel=1e-5)


def test_a_model_that_cannot_know_is_never_right() -> None:
    assert last_word_accuracy(Oracle(0.0), Letters(), several()).accuracy == 0
    uniform = last_word_accuracy(Oracle(1 / VOCABULARY), Letters(), ["a bad cab", "a b c d"])
    assert uniform.nll == pytest.approx(math.log(VOCABULARY) * (4 + 2) / 2, rel=1e-5)


def test_the_size_of_a_batch_changes_nothing() -> None:
    model, asked = tiny_model(seed=3), passages(Letters(), several())
    alone = last_words(model, asked, 1)
    for size in (2, 3, 100):
        nll, correct = last_words(model, asked, size)
        assert torch.allclose(nll, alone[0], rtol=1e-4)
        assert torch.equal(correct, alone[1])


@given(st.lists(WORDS, min_size=1, max_size=5), st.sampled_from([Letters, Merging]))
def test_context_and_word_are_the_whole_text_in_tokens(drawn: list[list[str]], tokenizer: type[Letters]) -> None:
    """Nothing is lost or encoded twice, and no token that holds a letter of the word is context."""
    texts = ["d " + " ".join(words) for words in drawn]
    for text, passage in zip(texts, passages(tokenizer(), texts), strict=True):
        assert list(passage.context + passage.word) == tokenizer()(text, False)["input_ids"]
        pieces = ["", *LETTERS, *tokenizer.merged]
        assert words_by_hand(text)[0].startswith("".join(pieces[i] for i in passage.context))
        if tokenizer is Letters:
            assert "".join(pieces[i] for i in passage.word) == words_by_hand(text)[1]


def test_a_token_that_reaches_into_the_last_word_is_predicted() -> None:
    (passage,) = passages(Merging(), ["bad, a"])
    assert [len(passage.context), len(passage.word)] == [3, 1]
    (passage,) = passages(Merging(), ["bad. cab"])
    assert [len(passage.context), len(passage.word)] == [3, 4]


def test_the_tokenizer_that_ships_splits_before_the_space(reference: tuple) -> None:
    tokenizer = reference[1]
    text = '"Not going to happen," replied Helen'
    (passage,) = passages(tokenizer, [text + "\n"])
    assert tokenizer.decode(passage.word) == " Helen"
    assert list(passage.context) == tokenizer(text.removesuffix(" Helen"))["input_ids"]


def test_a_long_context_loses_its_beginning() -> None:
    """The model sees no more tokens than asked for, the word among them and whole."""
    model, text = Oracle(), "abc " * 20 + "cage"
    assert last_word_accuracy(model, Letters(), [text], max_length=9).accuracy == 1
    assert model.seen == [Letters()(text[-9:], False)["input_ids"]]
    (passage,) = passages(Letters(), [text], max_length=6)
    assert len(passage.context) == 1
    assert len(passages(Letters(), [text], max_length=1000)[0].context) == 79


def test_a_subset_is_the_seed_s() -> None:
    texts = [f"{'a' * n} b" for n in range(1, 31)]
    everything = passages(Letters(), texts)
    assert [len(p.context) for p in everything] == list(range(1, 31))
    some = passages(Letters(), texts, samples=12, seed=4)
    assert some == passages(Letters(), texts, samples=12, seed=4)
    assert some != passages(Letters(), texts, samples=12, seed=5)
    assert len(set(some)) == 12
    assert set(some) < set(everything)
    assert set(passages(Letters(), texts, samples=99)) == set(everything)
    assert last_word_accuracy(Oracle(), Letters(), texts, samples=12).passages == 12


@pytest.mark.parametrize(
    ("given", "texts", "message"),
    [
        ({}, [], "no passages"),
        ({}, ["a b", "gab"], "passage 1 .*'gab'.*something before it"),
        ({}, [" fed"], "something before it"),
        ({}, [" \n"], "something before it"),
        ({"samples": 0}, ["a b"], "samples=0: must be at least 1"),
        ({"max_length": 5}, ["a bad face"], "passage 0: its last word has 5 tokens; max_length must be above"),
        ({"batch_size": 0}, ["a b"], "batch_size=0: must be at least 1"),
    ],
)
def test_what_cannot_be_asked_is_refused(given: dict, texts: list[str], message: str) -> None:
    with pytest.raises(sspruner.InputError, match=message):
        last_word_accuracy(Oracle(), Letters(), texts, **given)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_lambada_itself(reference: tuple, data_folder: Path) -> None:
    """On real passages a trained model is far better than chance."""
    model, tokenizer = reference
    with (data_folder / "lambada-test.jsonl").open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    asked = passages(tokenizer, texts, samples=16)
    result = last_word_accuracy(model, tokenizer, texts, samples=16)
    chance = math.log(len(tokenizer)) * sum(len(p.word) for p in asked) / 16
    assert result.nll < 0.75 * chance
    assert {tokenizer.decode(p.word)[0] for p in passages(tokenizer, texts)} <= {" ", "\n"}
