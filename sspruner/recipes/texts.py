"""Read the short texts of options: `state=0.5,head=0.25`, `layers.0.*=16`, `name=value`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from sspruner.errors import InputError

Texts = str | Iterable[str] | Mapping[str, Any]


def fractions_by_name(given: Any, option: str) -> Any:
    """`state` as it is; `state=0.5,head=0.25` as a mapping of fractions; a mapping as it is."""
    if isinstance(given, Mapping):
        return dict(given)
    if isinstance(given, str) and "=" not in given and "," not in given:
        return given
    return {name: _fraction(value, option, name) for name, value in _pairs(given, option)}


def names_by_axis(given: str, option: str) -> str | dict[str, str]:
    """`ghost` as it is; `state=ghost,mlp=magnitude` as a mapping of names."""
    return dict(_pairs(given, option)) if "=" in given else given


def units_by_pattern(given: Any, option: str) -> dict[str, int]:
    """`16`, which means all, or `PATTERN=16`, one or several: pattern -> units."""
    if isinstance(given, Mapping):
        return dict(given)
    texts = [str(given)] if isinstance(given, str | int) else [str(text) for text in given]
    pairs = [pair for text in texts for pair in _pairs(text if "=" in text else f"*={text}", option)]
    try:
        return {pattern: int(units) for pattern, units in pairs}
    except ValueError:
        raise InputError(f"--{option} {texts}: expected UNITS or PATTERN=UNITS, a whole number") from None


def values_by_name(given: Any, option: str) -> dict[str, Any]:
    """`name=value`, one or several; a value is read as JSON where it is JSON, else as a string."""
    if isinstance(given, Mapping):
        return dict(given)
    values: dict[str, Any] = {}
    for pair in [given] if isinstance(given, str) else given:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise InputError(f"--{option} {pair!r}: expected name=value")
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
    return values


def names_of(given: Iterable[str] | None) -> list[str]:
    """`ghost,balanced`, several times: every name once, in order."""
    return list(dict.fromkeys(name.strip() for text in given or [] for name in text.split(",") if name.strip()))


def _pairs(given: str | Iterable[str], option: str) -> list[tuple[str, str]]:
    """NAME=VALUE, several separated by commas; of several texts later ones win."""
    found: list[tuple[str, str]] = []
    for text in [given] if isinstance(given, str) else given:
        parts = [part.rpartition("=") for part in text.split(",")]
        names = [name.strip() for name, _, _ in parts]
        if not all(names) or len(set(names)) != len(names):
            raise InputError(f"--{option} {text!r}: expected NAME=VALUE, several separated by commas, each name once")
        found += [(name, value.strip()) for name, (_, _, value) in zip(names, parts, strict=True)]
    return found


def _fraction(text: str, option: str, name: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--{option} {name}={text}: {text!r} is not a number") from None
