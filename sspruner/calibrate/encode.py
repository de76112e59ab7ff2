"""Encode text in any form as token ids: names of files and datasets, strings, rows, conversations, ids."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from sspruner.calibrate.documents import COLUMNS, READABLE, Reading, is_conversation, read_text, texts_of
from sspruner.errors import InputError

AT_ONCE = 2**20  # characters of a text that are encoded at once, or up to twice as many
SPACE = re.compile(r"\S(?=\s)")  # the last character before white space
CHARACTERS_PER_TOKEN = 16  # read of a source without an end, for each token that is wanted
IN_PYTHON = (
    "in Python a list of strings, rows with a column of text, conversations, token ids, or what a tokenizer or "
    "`datasets` returns"
)


PAGE = "page"  # name of the text that ships with the package


def page() -> str:
    """Return the text that ships: the first two chapters of Jane Austen's Pride and Prejudice (1813)."""
    return Path(__file__).with_name("page.txt").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Encoded:
    """Token ids of a source.

    sequences  int64 (tokens,) each
    running    True for a single text of which windows are taken; False for sequences that begin and end
    name       name of the source, in results and errors
    """

    sequences: list[torch.Tensor]
    running: bool
    name: str


def encode(source: Any, tokenizer: Any, reading: Reading, rows: int, tokens: int) -> Encoded:
    """Return the token ids of a source. Padding, where an attention mask says so, is left out.

    rows, tokens: how many of either are wanted of a source without an end. Documents (the rows of a table, the files of
    a folder) become one running text.
    Raises InputError for a source that is empty or of another kind, with what would be read.
    """
    if isinstance(source, (str, Path)):
        name = str(source)
        _required(tokenizer, reading, name)
        return Encoded([_text(page() if name == PAGE else read_text(name, reading), tokenizer)], True, name)
    name = source_name(source)
    endless = not isinstance(source, Sized)
    if isinstance(source, Mapping):
        source = _rows_of_columns(source, f"{reading.what} {name}")
    elif not isinstance(source, Iterable) or isinstance(source, bytes) or getattr(source, "ndim", 2) < 1:
        raise InputError(f"{reading.what}: a {name} is not read as text; give {READABLE}; {IN_PYTHON}")
    every = (row for row in source if row is not None)
    first = next(every, None)
    if first is None:
        raise InputError(f"{reading.what} {name}: empty")
    every = chain([first], every)  # type: ignore[assignment]
    column = reading.column or "input_ids"
    if _is_ids(first) or (isinstance(first, Mapping) and column in first and _is_ids(first[column])):
        wanted = islice(every, rows) if endless else every
        return Encoded(
            [_ids(row, column, f"{reading.what} {name}: row {i}") for i, row in enumerate(wanted)], False, name
        )
    _required(tokenizer, reading, name)
    if isinstance(first, Mapping) or is_conversation(first):
        texts = texts_of(every, name, reading)
        found = _first_characters(texts, CHARACTERS_PER_TOKEN * tokens) if endless else texts
        return Encoded([_text(_joined(found, f"{reading.what} {name}"), tokenizer)], True, name)
    strings = list(texts_of(islice(every, rows) if endless else every, name, reading))
    if not any(text.strip() for text in strings):
        raise InputError(f"{reading.what} strings: empty")
    found_ids = tokenizer(strings, add_special_tokens=False)["input_ids"]
    return Encoded([torch.tensor(ids, dtype=torch.long) for ids in found_ids], False, "strings")


def source_name(source: Any) -> str:
    """Return the name of a source in results: that of a file or dataset, else what kind of value it is."""
    if isinstance(source, (str, Path)):
        return str(source)
    return "tokens" if hasattr(source, "ndim") else type(source).__name__


def _required(tokenizer: Any, reading: Reading, name: str) -> None:
    if tokenizer is None:
        raise InputError(
            f"{reading.what} {name}: text needs a tokenizer and this model has none; give tokens or 'self'"
        )


def _text(text: str, tokenizer: Any) -> torch.Tensor:
    """Return the token ids of a text. A long one is encoded in parts: tokenizers take some 500 bytes for each token."""
    parts = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in _parts(text)]
    return torch.cat([torch.tensor(ids, dtype=torch.long) for ids in parts])


def _parts(text: str) -> Iterator[str]:
    """Yield a text in parts of about AT_ONCE characters, cut where white space begins, as tokenizers end words."""
    begin = 0
    while len(text) - begin > 2 * AT_ONCE:
        found = SPACE.search(text, begin + AT_ONCE, begin + 2 * AT_ONCE)
        end = found.start() + 1 if found else begin + 2 * AT_ONCE
        yield text[begin:end]
        begin = end
    yield text[begin:]


def _joined(texts: Iterable[str], place: str) -> str:
    text = "\n\n".join(texts)
    if not text.strip():
        raise InputError(f"{place}: empty")
    return text


def _first_characters(texts: Iterable[str], count: int) -> Iterator[str]:
    for text in texts:
        yield text
        count -= len(text)
        if count <= 0:
            return


def _rows_of_columns(columns: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
    """Return the rows of a mapping from columns to values, such as a tokenizer returns. A single row may be flat."""
    values: dict[str, Any] = {
        name: value for name, value in columns.items() if isinstance(value, Sized) and not isinstance(value, str)
    }
    if any(hasattr(value, "column_names") for value in values.values()):
        raise InputError(f"{place}: has the splits {', '.join(values)}; give one of them")
    known = [name for name in ("input_ids", *COLUMNS) if name in values]
    if known and len(values[known[0]]) and isinstance(values[known[0]][0], int):
        values = {name: [value] for name, value in values.items()}
    lengths = {len(value) for value in values.values()}
    if len(lengths) != 1:
        raise InputError(f"{place}: its columns have different lengths; it has {', '.join(map(str, columns))}")
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


def _is_ids(value: Any) -> bool:
    """Check whether a value is a sequence of token ids."""
    if hasattr(value, "ndim"):
        return bool(value.ndim)
    return isinstance(value, list | tuple) and len(value) > 0 and isinstance(value[0], int)


def _ids(row: Any, column: str, place: str) -> torch.Tensor:
    """Return a row's token ids without padding, int64 (tokens,)."""
    mask = row.get("attention_mask") if isinstance(row, Mapping) else None
    try:
        ids = torch.as_tensor(row[column] if isinstance(row, Mapping) else row).cpu()
        kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else torch.as_tensor(mask).cpu().bool()
    except (TypeError, ValueError, RuntimeError, KeyError, OverflowError) as error:
        raise InputError(f"{place} is not a sequence of token ids ({type(error).__name__}: {error})") from error
    if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputError(f"{place} is not a sequence of token ids: {ids.dtype} of shape {tuple(ids.shape)}")
    if kept.shape != ids.shape:
        raise InputError(f"{place}: its attention mask has shape {tuple(kept.shape)}, its ids {tuple(ids.shape)}")
    return ids[kept].long()
