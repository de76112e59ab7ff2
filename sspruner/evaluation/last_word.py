"""LAMBADA: accuracy and nll of the last word of a passage (Paperno et al., arXiv 1606.06031).

    accuracy = share of passages of which every token of the last word is the argmax, each after the true ones before it
    nll      = mean over passages of - sum_i log p(token i of the last word | all before it), in nats per word

The last word is the text after the last white space, with that white space. The whole passage is encoded, and so is the
passage without its last word; the word's tokens are those of the whole after the longest prefix that both share. So the
model reads the same tokens as in plain text, and no token that holds a part of the word counts as context. No special
tokens are added, as everywhere in sspruner. As in lm-eval's lambada_openai, there is no stop-word filter or any other
filter, and no second guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sspruner.calibrate.documents import TABLES, Reading, kind, pieces
from sspruner.compute.forward import forward
from sspruner.errors import InputError


@dataclass(frozen=True)
class Passage:
    """Token ids of a passage without its last word (cut on the left if too long), and of that word."""

    context: tuple[int, ...]
    word: tuple[int, ...]


@dataclass(frozen=True)
class LastWord:
    """Accuracy, in [0, 1]; mean negative log-likelihood of the last word, in nats per word; number of passages."""

    accuracy: float
    nll: float
    passages: int


def last_word_accuracy(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    samples: int | None = None,
    seed: int = 0,
    max_length: int = 1024,
    batch_size: int = 16,
) -> LastWord:
    """Measure a model on LAMBADA passages.

    samples: number of passages, drawn with the seed, the same for every model with one tokenizer; default: all.
    max_length: maximum tokens of a passage; longer contexts are cut at the beginning.
    Raises InputError for a passage without a context, and for a word that leaves it no room.
    """
    nll, correct = last_words(model, passages(tokenizer, texts, samples, seed, max_length), batch_size)
    return LastWord(float(correct.double().mean()), float(nll.mean()), len(nll))


def passages(
    tokenizer: Any, texts: Sequence[str], samples: int | None = None, seed: int = 0, max_length: int = 1024
) -> list[Passage]:
    """Return the passages that `last_word_accuracy` measures, as tokens."""
    if not texts:
        raise InputError("no passages to read")
    if samples is not None and samples < 1:
        raise InputError(f"samples={samples}: must be at least 1")
    order = list(range(len(texts)))
    if samples is not None:
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()[:samples]
    return [_split(tokenizer, texts[i], i, max_length) for i in order]


def read_passages(name: str) -> list[str]:
    """Read passages, the rows of a table, of a folder of tables, or of a `datasets` dataset.

    A dataset is NAME[:CONFIG[:SPLIT]]; the default split is test. Raises InputError for anything else, and for plain
    text, which does not say where a passage ends.
    """
    path = Path(name).expanduser()
    if path.is_file() and kind(path) not in TABLES:
        raise InputError(f"lambada file {name}: plain text has no passages; give {', '.join(TABLES)} or a dataset")
    return [text for text, _ in pieces(name, Reading("lambada", split="test"))]


def _split(tokenizer: Any, text: str, number: int, max_length: int) -> Passage:
    text = text.rstrip()
    before = (text.rsplit(maxsplit=1) or [text])[0]  # the same text, if it is a single word
    whole, shorter = (list(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (text, before))
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(whole, shorter, strict=False)))
    context, word = whole[:shared], whole[shared:]
    if not context or not word:
        raise InputError(f"passage {number} ({text[:40]!r}): needs a last word and something before it")
    if len(word) >= max_length:
        raise InputError(f"passage {number}: its last word has {len(word)} tokens; max_length must be above that")
    return Passage(tuple(context[len(word) - max_length :]), tuple(word))


@torch.no_grad()
def last_words(model: nn.Module, items: Sequence[Passage], batch_size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each last word's negative log-likelihood, fp64, and whether all its tokens are the argmax, bool:
    (passages,).

    Passages of similar length share a batch, padded on the right. Of equal logits the first token is the argmax.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}: must be at least 1")
    nll, correct = torch.zeros(len(items), dtype=torch.float64), torch.zeros(len(items), dtype=torch.bool)
    order = sorted(range(len(items)), key=lambda i: len(items[i].context) + len(items[i].word))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        ids = [torch.tensor(items[i].context + items[i].word) for i in rows]
        tokens = nn.utils.rnn.pad_sequence(ids, batch_first=True)  # (b, T), int64
        mask = torch.arange(tokens.shape[1]) < torch.tensor([len(row) for row in ids])[:, None]  # (b, T)
        logits = forward(model, tokens, mask, use_cache=False).logits  # (b, T, V)
        for i, row in zip(rows, logits, strict=True):
            word = torch.tensor(items[i].word, device=row.device)  # (w,)
            last = len(items[i].context) - 1
            logp = row[last : last + len(word)].float().log_softmax(-1)  # (w, V): each predicts one token of the word
            nll[i] = -logp.gather(-1, word[:, None]).double().sum()
            correct[i] = bool((logp.argmax(-1) == word).all())
    return nll, correct
