"""Read options that hold several values: `ghost,magnitude`, `0.25,0.5`, `1,16,64`, each repeatable.

Like those of `texts.py`, each function takes the value and the name of the option, with which its errors begin. What is
no text is returned as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sspruner.errors import InputError
from sspruner.recipes.texts import names_of


def names_in(given: Any, option: str) -> Any:
    """Read `ghost,magnitude`, one text or several, as a tuple of names, each once; what is no text stays."""
    found: list[Any] = []
    for one in _several(given):
        found += [name for name in (names_of([one]) if isinstance(one, str) else [one]) if name not in found]
    return given if given is None else tuple(found)


def fractions_in(given: Any, option: str) -> Any:
    """Read `0.25,0.5`, one text or several, as a tuple of numbers."""
    return tuple(_number(one, option) if isinstance(one, str) else one for one in names_in(given, option))


def numbers_in(given: Any, option: str) -> Any:
    """Read `1,16,64`, one text or several, as a tuple of whole numbers of at least 1."""
    texts = names_in(given, option)
    if not any(isinstance(one, str) for one in texts or ()):
        return texts
    try:
        numbers = tuple(int(one) for one in texts)
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        shown = given if isinstance(given, str) else ",".join(map(str, given))
        raise InputError(f"{option} {shown!r}: expected whole numbers of at least 1, separated by commas")
    return tuple(dict.fromkeys(numbers))


def _several(given: Any) -> Iterable[Any]:
    """Return one value as a list of one, several as they are."""
    if given is None:
        return []
    return given if isinstance(given, Iterable) and not isinstance(given, str | Mapping) else [given]


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{option}: {text!r} is not a number") from None
