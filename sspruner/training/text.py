"""Training text: sources read as streams and packed into blocks of tokens, some of which are held out.

The order of the blocks depends on the seed only: it is the same for any number of processes, and after a restart, which
skips the blocks that were trained on before.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, ClassVar

import torch

from sspruner.calibrate.documents import Reading, pieces, texts_of
from sspruner.calibrate.encode import source_name
from sspruner.errors import InputError
from sspruner.recipes.train import Settings, TrainText

SHUFFLED = 1024  # size of the shuffle buffer, in blocks
PIECES = 64  # documents, or parts of plain text, that are tokenised together


@dataclass(frozen=True)
class Text:
    """Sources of text, as blocks of tokens.

    sources: names of files, folders or datasets (calibrate/documents.py); in Python also lists of strings, and rows
    such as those of a `Dataset`. Each block is from one of them, drawn with equal probability.
    held_out: number of blocks at the beginning of each source that are never trained on.
    """

    sources: tuple[Any, ...]
    tokenizer: Any
    seq_len: int
    held_out: int = 16
    seed: int = 0
    column: str = ""

    measure: ClassVar[str] = "held_out_perplexity"

    @classmethod
    def of(cls, text: TrainText, settings: Settings, tokenizer: Any) -> Text:
        """Make the text of a recipe.

        Raises InputError for a model without a tokenizer, and for a recipe without text.
        """
        if not text.text:
            raise InputError("training text: the recipe names none")
        if tokenizer is None:
            raise InputError("training text needs a tokenizer, and this model has none: give --tokenizer")
        return cls(text.text, tokenizer, settings.seq_len, text.held_out, settings.seed, text.text_column)

    def identity(self) -> dict[str, Any]:
        """Return the settings that identify this text, as JSON."""
        column = {"text_column": self.column} if self.column else {}
        return {
            "text": [source_name(source) for source in self.sources],
            "held_out": self.held_out,
            "text_seed": self.seed,
            **column,
        }

    def held_out_blocks(self) -> torch.Tensor:
        """Return the held-out blocks, int64 (sources * held_out, seq_len).

        Raises InputError for a source that is too short.
        """
        return torch.stack([block for source in self.sources for block in self._first(source)])

    def training_blocks(self, skip: int = 0) -> Iterator[torch.Tensor]:
        """Yield blocks, int64 (seq_len,), without end: a finished source begins again. skip: number of blocks to
        skip.
        """
        rng = random.Random(self.seed)
        streams = [self._repeated(source, number) for number, source in enumerate(self.sources)]
        return islice((next(rng.choice(streams)) for _ in count()), skip, None)

    def _first(self, source: Any) -> list[torch.Tensor]:
        blocks = list(islice(packed(source, self.tokenizer, self.seq_len, self.column), self.held_out + 1))
        if len(blocks) <= self.held_out:
            raise InputError(
                f"training text {source_name(source)}: {len(blocks)} blocks of {self.seq_len} tokens, of which "
                f"{self.held_out} are held out; give more text, or less --held-out or --seq-len"
            )
        return blocks[: self.held_out]

    def _repeated(self, source: Any, number: int) -> Iterator[torch.Tensor]:
        for epoch in count():
            blocks = islice(packed(source, self.tokenizer, self.seq_len, self.column), self.held_out, None)
            yield from shuffled(blocks, random.Random(f"{self.seed} {number} {epoch}"))


def shuffled(blocks: Iterator[torch.Tensor], rng: random.Random, size: int = SHUFFLED) -> Iterator[torch.Tensor]:
    """Yield each block once, in random order, from a shuffle buffer of `size`."""
    buffer = list(islice(blocks, size))
    for block in blocks:
        at = rng.randrange(len(buffer))
        yield buffer[at]
        buffer[at] = block
    rng.shuffle(buffer)
    yield from buffer


def packed(source: Any, tokenizer: Any, seq_len: int, column: str = "") -> Iterator[torch.Tensor]:
    """Yield a source as blocks, int64 (seq_len,).

    Documents follow one another, each followed by an end-of-text token if the tokenizer has one. The last incomplete
    block is dropped.

    Raises InputError for a source that cannot be read.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    parts = _pieces(source, Reading("training text", column, tokenizer, stream=True))
    while texts := list(islice(parts, PIECES)):
        encoded = tokenizer([text for text, _ in texts], add_special_tokens=False)["input_ids"]
        for piece, (_, last) in zip(encoded, texts, strict=True):
            ids += piece + (end if last else [])
        whole = len(ids) // seq_len * seq_len
        yield from torch.tensor(ids[:whole], dtype=torch.long).view(-1, seq_len)
        ids = ids[whole:]


def _pieces(source: Any, reading: Reading) -> Iterator[tuple[str, bool]]:
    """Yield (text, whether a document ends with it). Raises InputError for a source that can be read only once."""
    if isinstance(source, (str, Path)):
        return pieces(str(source), reading)
    if isinstance(source, Iterator) or not isinstance(source, Iterable):
        raise InputError(f"{reading.what} {source_name(source)}: can be read only once; give a list or a `Dataset`")
    return ((text, True) for text in texts_of(source, source_name(source), reading))
