"""Training text: sources read as streams, packed into blocks of tokens, some of which are never trained on.

Block follows block in an order that the seed decides alone: the same for any number of processes, and after a restart,
which reads past what was trained on before.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch

from sspruner.calibrate.sources import quiet
from sspruner.errors import InputError
from sspruner.recipes.train import Settings, TrainText

SHUFFLED = 1024  # blocks among which the next one is drawn: a stream cannot be shuffled as a whole
CHARACTERS = 2**16  # of a plain text that are tokenised together, up to the last white space
DOCUMENTS = 64  # of a dataset that are tokenised together


@dataclass(frozen=True)
class Text:
    """Sources of text as blocks of tokens.

    sources: files (.jsonl and .json with a column `text`, anything else as plain UTF-8), or datasets as
    NAME[:CONFIG[:SPLIT]]; each block is of one of them, drawn with equal chances.
    held_out: blocks at the beginning of each source that are never trained on.
    """

    sources: tuple[str, ...]
    tokenizer: Any
    seq_len: int
    held_out: int = 16
    seed: int = 0

    @classmethod
    def of(cls, text: TrainText, settings: Settings, tokenizer: Any) -> Text:
        """Make the text of a recipe. Raises InputError for a model without a tokenizer, and where no text is named."""
        if not text.text:
            raise InputError("training text: the recipe names none")
        if tokenizer is None:
            raise InputError("training text needs a tokenizer, and this model has none: give --tokenizer")
        return cls(text.text, tokenizer, settings.seq_len, text.held_out, settings.seed)

    def asked(self) -> dict[str, Any]:
        """What makes it this text and no other; JSON."""
        return {"text": list(self.sources), "held_out": self.held_out, "text_seed": self.seed}

    def held_out_blocks(self) -> torch.Tensor:
        """int64 (sources * held_out, seq_len). Raises InputError for a source that holds no more than that."""
        return torch.stack([block for source in self.sources for block in self._first(source)])

    def training_blocks(self, skip: int = 0) -> Iterator[torch.Tensor]:
        """Blocks, int64 (seq_len,), without end: a source that is through begins again. skip: blocks to read past."""
        rng = random.Random(self.seed)
        streams = [self._repeated(source, number) for number, source in enumerate(self.sources)]
        return islice((next(rng.choice(streams)) for _ in count()), skip, None)

    def _first(self, source: str) -> list[torch.Tensor]:
        found = list(islice(packed(source, self.tokenizer, self.seq_len), self.held_out + 1))
        if len(found) <= self.held_out:
            raise InputError(
                f"training text {source}: {len(found)} blocks of {self.seq_len} tokens, of which {self.held_out} are "
                "held out; give more text, or less --held-out or --seq-len"
            )
        return found[: self.held_out]

    def _repeated(self, source: str, number: int) -> Iterator[torch.Tensor]:
        for epoch in count():
            blocks = islice(packed(source, self.tokenizer, self.seq_len), self.held_out, None)
            yield from shuffled(blocks, random.Random(f"{self.seed} {number} {epoch}"))


def shuffled(blocks: Iterator[torch.Tensor], rng: random.Random, size: int = SHUFFLED) -> Iterator[torch.Tensor]:
    """Each block once; the next one is always drawn among `size`."""
    held = list(islice(blocks, size))
    for block in blocks:
        at = rng.randrange(len(held))
        yield held[at]
        held[at] = block
    rng.shuffle(held)
    yield from held


def packed(source: str, tokenizer: Any, seq_len: int) -> Iterator[torch.Tensor]:
    """A source as blocks, int64 (seq_len,): its documents one after another, each with an end of text behind it if the
    tokenizer has one. What is left of the last document, less than a block, is dropped.

    Raises InputError for a source that cannot be read.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for texts in pieces(source):
        found = tokenizer([text for text, _ in texts], add_special_tokens=False)["input_ids"]
        for piece, (_, last) in zip(found, texts, strict=True):
            ids += piece + (end if last else [])
        whole = len(ids) // seq_len * seq_len
        yield from torch.tensor(ids[:whole], dtype=torch.long).view(-1, seq_len)
        ids = ids[whole:]


def pieces(source: str) -> Iterator[list[tuple[str, bool]]]:
    """(text, whether a document ends with it), a few at a time."""
    path = Path(source).expanduser()
    if path.is_file() and path.suffix not in (".json", ".jsonl"):
        for text, last in _read(path):
            yield [(text, last)]
    else:
        rows = iter(_rows(source, path))
        while texts := list(islice(rows, DOCUMENTS)):
            yield [(text, True) for text in texts]


def _read(path: Path) -> Iterator[tuple[str, bool]]:
    """A plain text in parts that end with white space."""
    left = ""
    try:
        with path.open(encoding="utf-8") as file:
            while more := file.read(CHARACTERS):
                text = left + more
                cut = max(text.rfind(" "), text.rfind("\n")) + 1 or len(text)
                yield text[:cut], False
                left = text[cut:]
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"training text {path}: cannot be read as UTF-8 ({error})") from error
    yield left, True


def _rows(source: str, path: Path) -> Iterable[str]:
    """The column `text` of a JSON lines file or a dataset, as a stream."""
    import datasets

    name, config, split = [*source.split(":"), "", ""][:3]
    try:
        with quiet():
            if path.is_file():
                rows = datasets.load_dataset("json", data_files=str(path), split="train", streaming=True)
            else:
                rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for row in rows:
            if not isinstance(row.get("text"), str):
                raise InputError(f"training text {source}: a row without a string `text`; it has {', '.join(row)}")
            yield row["text"]
    except InputError:
        raise
    except Exception as error:  # the hub, a loader or a parser may fail in any way
        brief = str(error.__cause__ or error).strip().split("\n")[0]
        raise InputError(f"training text {source}: no such file, and datasets cannot load it: {brief}") from error
