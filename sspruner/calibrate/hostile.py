"""Refuse files that would take memory or a parser down: archives that unpack to too much, JSON nested too deep."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sspruner.errors import InputError

PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
UNREADABLE = (OSError, EOFError, lzma.LZMAError, zlib.error)  # what opening, reading and unpacking raise
MOST_PACKED = 200  # times its size that a packed file may unpack to; text reaches 10, logs perhaps 50
MOST_NESTED = 500  # brackets in brackets; the JSON reader of Arrow crashes at some 10,000
AT_ONCE = 2**20  # bytes read at once
# A string, up to its end or that of the bytes; or a bracket.
TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*+("?)|[\[{\]}]', re.DOTALL)
REST = re.compile(rb'(?:[^"\\]|\\.)*+"', re.DOTALL)  # of a string that began before


def check_unpacked(path: Path, place: str) -> None:
    """Raise InputError for a packed file that unpacks to so much that it can hardly be text. place: begins errors."""
    if path.suffix.lower() not in PACKED:
        return
    most, done = max(2**26, MOST_PACKED * path.stat().st_size), 0
    try:
        with PACKED[path.suffix.lower()](path, "rb") as file:
            while done <= most and (data := file.read(AT_ONCE)):
                done += len(data)
    except UNREADABLE as error:
        raise InputError(f"{place}: cannot be unpacked ({str(error) or type(error).__name__})") from error
    if done > most:
        raise InputError(f"{place}: unpacks to over {MOST_PACKED} times its size; if it is text, unpack it")


def check_nesting(path: Path, place: str) -> None:
    """Raise InputError for JSON, or lines of it, that nest deeper than any text does. place: begins errors."""
    try:
        with PACKED.get(path.suffix.lower(), open)(path, "rb") as file:
            if nested(file, MOST_NESTED):
                raise InputError(f"{place}: nests over {MOST_NESTED} brackets; give rows with a column of text")
    except UNREADABLE as error:
        raise InputError(f"{place}: cannot be read ({str(error) or type(error).__name__})") from error


def nested(file: Any, most: int) -> bool:
    """Check whether brackets of JSON, outside strings, nest deeper than `most`. file: yields bytes."""
    depth, in_string = 0, False
    while data := file.read(AT_ONCE):
        while _ends_escaped(data) and (more := file.read(1)):
            data += more
        begin = 0
        if in_string:
            if not (rest := REST.match(data)):
                continue
            begin, in_string = rest.end(), False
        for token in TOKEN.finditer(data, begin):
            sign = data[token.start()]
            if sign == ord('"'):
                in_string = not token[1]
            elif sign in b"[{":
                depth += 1
                if depth > most:
                    return True
            else:
                depth = max(0, depth - 1)
    return False


def _ends_escaped(data: bytes) -> bool:
    """Check whether the bytes end with a backslash that escapes what follows."""
    return (len(data) - len(data.rstrip(b"\\"))) % 2 == 1
