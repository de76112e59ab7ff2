"""Read the short texts of options: `state=0.5,head=0.25`, `layers.0.*=16`, `name=value`.

Each function takes the value, and the name of the option, with which its errors begin. What is no text is returned as
it is: pydantic checks it where it comes from a file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from sspruner.errors import InputError
from sspruner.units import parse_bytes, parse_increase, parse_parameters


def fractions_by_axis(given: Any, option: str) -> Any:
    """`state` as it is; `state=0.5,head=0.25` as a mapping of fractions."""
    if not isinstance(given, str) or ("=" not in given and "," not in given):
        return given
    return {name: _fraction(value, f"{option} {given!r}") for name, value in _pairs(given, option)}


def fractions_by_pattern(given: Any, option: str) -> Any:
    """`PATTERN=FRACTION`, one text or several, as a mapping of fractions; of one pattern the last."""
    if (texts := _texts(given)) is None:
        return given or {}
    return {
        name: _fraction(value, f"{option} {name}={value}") for text in texts for name, value in _pairs(text, option)
    }


def names_by_axis(given: Any, option: str) -> Any:
    """`ghost` as it is; `state=ghost,mlp=magnitude` as a mapping of names."""
    return dict(_pairs(given, option)) if isinstance(given, str) and "=" in given else given


def units_by_pattern(given: Any, option: str) -> Any:
    """`16`, which means all, or `PATTERN=16`, one text or several, as a mapping of units; of one pattern the last."""
    if isinstance(given, int) and not isinstance(given, bool):
        return {"*": given}
    if (texts := _texts(given)) is None:
        return given or {}
    pairs = [pair for text in texts for pair in _pairs(text if "=" in text else f"*={text}", option)]
    try:
        return {pattern: int(units) for pattern, units in pairs}
    except ValueError:
        raise InputError(f"{option} {texts}: expected UNITS or PATTERN=UNITS, a whole number") from None


def values_by_name(given: Any, option: str) -> Any:
    """`name=value`, one text or several, as a mapping; a value is read as JSON where it is JSON, else as a string."""
    if (texts := _texts(given)) is None:
        return given or {}
    values: dict[str, Any] = {}
    for pair in texts:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise InputError(f"{option} {pair!r}: expected name=value")
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
    return values


def several(given: Any, option: str) -> Any:
    """One text, or several, as a tuple."""
    return given if (texts := _texts(given)) is None else tuple(texts)


def pattern_of(given: Any, option: str) -> Any:
    """`2:4` as it is. Raises InputError for the number that YAML reads it as without quotes."""
    if isinstance(given, int) and not isinstance(given, bool):
        n, m = divmod(given, 60)
        raise InputError(f"{option}: YAML reads {n}:{m} without quotes as {given}; write it in quotes: '{n}:{m}'")
    return given


def bytes_of(given: Any, option: str) -> Any:
    """`25MB` as bytes."""
    return parse_bytes(given, option) if isinstance(given, str) else given


def parameters_of(given: Any, option: str) -> Any:
    """`0.8x` and `900M` as numbers."""
    return parse_parameters(given, option) if isinstance(given, str) else given


def increase_of(given: Any, option: str) -> Any:
    """`1%` as a fraction."""
    return parse_increase(given, option) if isinstance(given, str) else given


def names_of(given: Iterable[str] | None) -> list[str]:
    """`ghost,balanced`, several times: every name once, in order."""
    return list(dict.fromkeys(name.strip() for text in given or [] for name in text.split(",") if name.strip()))


def _texts(given: Any) -> list[str] | None:
    """One text, or several; None for what is no text."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, Iterable) or isinstance(given, Mapping):
        return None
    found = list(given)
    return found if all(isinstance(text, str) for text in found) else None


def _pairs(text: str, option: str) -> list[tuple[str, str]]:
    """NAME=VALUE, several separated by commas."""
    parts = [part.rpartition("=") for part in text.split(",")]
    names = [name.strip() for name, _, _ in parts]
    if not all(names) or len(set(names)) != len(names):
        raise InputError(f"{option} {text!r}: expected NAME=VALUE, several separated by commas, each name once")
    return [(name, value.strip()) for name, (_, _, value) in zip(names, parts, strict=True)]


def _fraction(text: str, what: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{what}: {text!r} is not a number") from None
