"""Read the short texts of options: `state=0.5,head=0.25`, `layers.0.*=16`, `name=value`.

Each function takes a value and the name of its option, with which its errors begin. Values that are not text are
returned unchanged: pydantic checks them if they come from a file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from sspruner.errors import InputError
from sspruner.units import parse_bytes, parse_increase, parse_parameters, parse_tokens

DTYPES = ("auto", "float32", "bfloat16", "float16")


def seed_in_64_bits(value: Any, option: str) -> Any:
    """Return a seed. Raises InputError for a number that random generators do not take."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise InputError(f"{option} {value}: must fit in 64 bits")
    return value


def known_dtype(value: Any, option: str) -> Any:
    """Return the name of a dtype. Raises InputError for another one."""
    if value not in DTYPES:
        raise InputError(f"{option} {value!r}: must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    return value


def tokens_or_chunk(value: Any, option: str) -> Any:
    """Read `16` as a number of tokens, and `chunk` as it is. Raises InputError for anything else."""
    if value is None or value == "chunk":
        return value
    number = int(value) if isinstance(value, str) and value.isascii() and value.isdecimal() else value
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise InputError(f"{option} {value!r}: expected a number of tokens, at least 1, or chunk")
    return number


def fractions_by_axis(value: Any, option: str) -> Any:
    """Read `state` as it is, and `state=0.5,head=0.25` as a mapping of fractions."""
    if not isinstance(value, str) or ("=" not in value and "," not in value):
        return value
    return {name: _fraction(number, f"{option} {value!r}") for name, number in _pairs(value, option)}


def fractions_by_pattern(value: Any, option: str) -> Any:
    """Read `PATTERN=FRACTION`, one text or several, as a mapping of fractions; the last of equal patterns wins."""
    if (texts := _texts(value)) is None:
        return value or {}
    return {
        name: _fraction(value, f"{option} {name}={value}") for text in texts for name, value in _pairs(text, option)
    }


def names_by_axis(value: Any, option: str) -> Any:
    """Read `ghost` as it is, and `state=ghost,mlp=magnitude` as a mapping of names."""
    return dict(_pairs(value, option)) if isinstance(value, str) and "=" in value else value


def units_by_pattern(value: Any, option: str) -> Any:
    """Read `16` (all), or `PATTERN=16`, one text or several, as a mapping of units; the last of equal patterns wins."""
    if isinstance(value, int) and not isinstance(value, bool):
        return {"*": value}
    if (texts := _texts(value)) is None:
        return value or {}
    pairs = [pair for text in texts for pair in _pairs(text if "=" in text else f"*={text}", option)]
    try:
        return {pattern: int(units) for pattern, units in pairs}
    except ValueError:
        raise InputError(f"{option} {texts}: expected UNITS or PATTERN=UNITS, a whole number") from None


def values_by_name(data: Any, option: str) -> Any:
    """Read `name=value`, one text or several, as a mapping; each value is parsed as JSON if possible, else a string."""
    if (texts := _texts(data)) is None:
        return data or {}
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


def several(value: Any, option: str) -> Any:
    """Read one text, or several, as a tuple."""
    return value if (texts := _texts(value)) is None else tuple(texts)


def pattern_of(value: Any, option: str) -> Any:
    """Return `2:4` unchanged. Raises InputError for the number that YAML reads it as without quotes."""
    if isinstance(value, int) and not isinstance(value, bool):
        n, m = divmod(value, 60)
        raise InputError(f"{option}: YAML reads {n}:{m} without quotes as {value}; write it in quotes: '{n}:{m}'")
    return value


def bytes_of(value: Any, option: str) -> Any:
    """Read `25MB` as bytes."""
    return parse_bytes(value, option) if isinstance(value, str) else value


def tokens_of(value: Any, option: str) -> Any:
    """Read `4k` as tokens."""
    return parse_tokens(value, option) if isinstance(value, str) else value


def parameters_of(value: Any, option: str) -> Any:
    """Read `0.8x` and `900M` as numbers."""
    return parse_parameters(value, option) if isinstance(value, str) else value


def increase_of(value: Any, option: str) -> Any:
    """Read `1%` as a fraction. A whole number is read as the text of it, which may be meant as a percentage."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return parse_increase(str(value), option) if whole or isinstance(value, str) else value


def names_of(given: Iterable[str] | None) -> list[str]:
    """Read `ghost,balanced`, one text or several: unique names, in order."""
    return list(dict.fromkeys(name.strip() for text in given or [] for name in text.split(",") if name.strip()))


def _texts(value: Any) -> list[str] | None:
    """Return one text, or several, as a list; None for other values."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, Iterable) or isinstance(value, Mapping):
        return None
    texts = list(value)
    return texts if all(isinstance(text, str) for text in texts) else None


def _pairs(text: str, option: str) -> list[tuple[str, str]]:
    """Read NAME=VALUE, several separated by commas, as pairs."""
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
