"""JSON as the standard defines it: no NaN, no Infinity. Everything that the package writes as JSON goes through here.

A float that is not finite is written as null, and the key `not_finite` of the outermost object says which it was:

    {"pruned": {"perplexity": null}, "not_finite": {"/pruned/perplexity": "Infinity"}}

Each of its keys is a JSON Pointer (RFC 6901) to a null, each value "NaN", "Infinity" or "-Infinity", which Python's
`float` and JavaScript's `Number` read. `loads` puts the numbers back. It also reads files with bare NaN and Infinity,
which version 0.1.0 wrote.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sspruner.errors import InputError
from sspruner.files.fields import table

NOT_FINITE = "not_finite"
NAMES = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
#: What reading a damaged file may raise.
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError)

T = TypeVar("T")


def dumps(
    data: Mapping[str, Any], *, indent: int | None = None, ensure_ascii: bool = True, sort_keys: bool = False
) -> str:
    """Write an object as strict JSON. Of finite data this is the text of `json.dumps`.

    Raises ValueError for an object that already has a key `not_finite`.
    """
    if NOT_FINITE in data:
        raise ValueError(f"{NOT_FINITE!r} is a key of strict JSON; name the field otherwise")
    reasons: dict[str, str] = {}
    finite = _finite(data, "", reasons)
    if reasons:
        finite[NOT_FINITE] = reasons
    return json.dumps(finite, indent=indent, ensure_ascii=ensure_ascii, sort_keys=sort_keys, allow_nan=False)


def loads(text: str) -> Any:
    """Read JSON, strict or not, with the numbers that `not_finite` names put back in place of their nulls.

    Raises ValueError for what is no JSON, and for a `not_finite` that does not fit.
    """
    data = json.loads(text)
    if isinstance(data, dict) and NOT_FINITE in data:
        for pointer, name in table(data.pop(NOT_FINITE)).items():
            _put_back(data, pointer, name)
    return data


def _finite(value: Any, pointer: str, reasons: dict[str, str]) -> Any:
    """Copy a value with null for what is not finite; `reasons` gets a line for each, pointer -> name."""
    if isinstance(value, float) and not math.isfinite(value):
        reasons[pointer] = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        return None
    if isinstance(value, Mapping):
        keyed = {key if isinstance(key, str) else json.dumps(key): part for key, part in value.items()}
        return {key: _finite(part, f"{pointer}/{_escaped(key)}", reasons) for key, part in keyed.items()}
    if isinstance(value, list | tuple):
        return [_finite(part, f"{pointer}/{i}", reasons) for i, part in enumerate(value)]
    return value


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")


def _put_back(data: Any, pointer: str, name: Any) -> None:
    """Replace the null at `pointer` by the number `name`. Raises ValueError if there is none."""
    *above, last = [part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]] or [""]
    try:
        for part in above:
            data = data[int(part) if isinstance(data, list) else part]
        place: Any = int(last) if isinstance(data, list) else last
        if data[place] is not None:
            raise ValueError("it is not null")
        data[place] = NAMES[name]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{NOT_FINITE} {pointer!r:.60}: {type(error).__name__}: {error}") from error


@contextmanager
def reading(what: str, path: str | Path) -> Iterator[None]:
    """Turn whatever a damaged file raises inside the block into one InputError that names the file and the reason."""
    try:
        yield
    except DAMAGE as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{what} {path}: not a {what} that sspruner wrote ({why})") from error


def load(what: str, path: str | Path, from_json: Callable[[Any], T]) -> T:
    """Read a record from its file. Raises InputError for a file that is missing or damaged."""
    with reading(what, path):
        return from_json(loads(Path(path).read_text(encoding="utf-8")))
