"""Read options that hold several values: `ghost,magnitude`, `0.25,0.5`, `1,16,64`, each repeatable.

Like those of `texts.py`, each function takes a value and the name of its option, with which its errors begin. Values
that are not text are returned unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sspruner.errors import InputError
from sspruner.recipes.texts import names_of


def names_in(value: Any, option: str) -> Any:
    """Read `ghost,magnitude`, one text or several, as a tuple of unique names; other values are kept."""
    names: list[Any] = []
    for one in _several(value):
        names += [name for name in (names_of([one]) if isinstance(one, str) else [one]) if name not in names]
    return value if value is None else tuple(names)


def fractions_in(value: Any, option: str) -> Any:
    """Read `0.25,0.5`, one text or several, as a tuple of numbers."""
    return tuple(_number(one, option) if isinstance(one, str) else one for one in names_in(value, option))


def numbers_in(value: Any, option: str) -> Any:
    """Read `1,16,64`, one text or several, as a tuple of whole numbers of at least 1."""
    return _whole_numbers(value, option, 1)


def seeds_in(value: Any, option: str) -> Any:
    """Read `0,1,2`, one text or several, as a tuple of whole numbers of at least 0."""
    return _whole_numbers(value, option, 0)


def _whole_numbers(value: Any, option: str, least: int) -> Any:
    texts = names_in(value, option)
    if not any(isinstance(one, str) for one in texts or ()):
        return texts
    try:
        numbers = tuple(int(one) for one in texts)
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < least:
        shown = value if isinstance(value, str) else ",".join(map(str, value))
        raise InputError(f"{option} {shown!r}: expected whole numbers of at least {least}, separated by commas")
    return tuple(dict.fromkeys(numbers))


def _several(value: Any) -> Iterable[Any]:
    """Return one value as a list, several unchanged."""
    if value is None:
        return []
    return value if isinstance(value, Iterable) and not isinstance(value, str | Mapping) else [value]


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{option}: {text!r} is not a number") from None
