"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def as_bytes(n: float) -> str:
    """A size in the unit that suits it, powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n < 1000 or unit == "TB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.2f} {unit}"
        n /= 1000
    return ""


def percent(before: Any, after: Any) -> str:
    """The change from one number to another; "" from zero."""
    return f"{100 * (after / before - 1):+.2f} %" if before else ""


def span(values: Sequence[int]) -> str:
    """Sorted numbers as the one that they are, or as smallest and largest."""
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"
