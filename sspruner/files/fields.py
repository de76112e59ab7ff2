"""Checks of single fields, for the `from_json` of records: each returns the value, or raises TypeError."""

from __future__ import annotations

import math
from typing import Any


def versioned(data: Any, version: int = 1) -> dict[str, Any]:
    """Return the fields of a file's outermost object but its version. Raises ValueError for another version."""
    fields = dict(table(data))
    if fields.pop("version") != version:
        raise ValueError(f"its version is not {version}")
    return fields


def number(value: Any) -> float:
    """Check a float. null is read as NaN, which version 0.1.0 wrote for non-finite numbers."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{str(value)[:40]!r} is not a number")
    return float(value)


def integer(value: Any) -> int:
    """Check an int of 64 bits."""
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**63:
        raise TypeError(f"{str(value)[:40]!r} is not a whole number")
    return value


def text(value: Any) -> str:
    """Check a str."""
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:40]!r} is not text")
    return value


def flag(value: Any) -> bool:
    """Check a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{str(value)[:40]!r} is neither true nor false")
    return value


def table(value: Any) -> dict[str, Any]:
    """Check an object."""
    if not isinstance(value, dict):
        raise TypeError(f"{str(value)[:40]!r} is not an object")
    return value


def items(value: Any) -> list[Any]:
    """Check a list."""
    if not isinstance(value, list):
        raise TypeError(f"{str(value)[:40]!r} is not a list")
    return value
