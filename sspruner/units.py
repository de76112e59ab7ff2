"""Parse and format sizes, rates and counts with units."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from sspruner.errors import InputError

SMALL = 1e-3  # numbers below are shown as 9.8e-5
UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def as_bytes(n: float) -> str:
    """Format a size in bytes with a suitable unit, powers of 1000, and three digits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n < 999.5 or unit == "TB":
            return f"{n:.{0 if unit == 'B' else places(max(n, 1), 3)}f} {unit}"
        n /= 1000
    return ""


def places(value: float, digits: int) -> int:
    """Return how many places after the point show a number with so many digits; 0 for large numbers."""
    return max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value and math.isfinite(value) else 0


def number_text(value: float) -> str:
    """Format a number with four digits: 58.04; all before the point, 12,345; below a thousandth two, 9.8e-5."""
    if not math.isfinite(value):
        return f"{value:g}"
    if 0 < abs(value) < SMALL:
        return re.sub(r"e-0*", "e-", f"{value:.1e}")
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"


def interval_text(interval: Sequence[float], *, unit: str = "", sign: str = "") -> str:
    """Format a value and its interval, [value, low, high], with the digits that the interval leaves certain.

    Two digits of half its width, so `+0.45 % (+0.30 to +0.60)`; without a width, as `number_text` does. sign: "+" to
    show that of positive numbers.
    """
    value, low, high = interval
    half = (high - low) / 2
    if not (math.isfinite(value) and 0 < half < math.inf):
        text = number_text(value)
        return f"{sign if value > 0 else ''}{text}{unit}"
    if max(abs(low), abs(high)) < SMALL:
        shown = [(sign if x > 0 else "") + number_text(x) for x in interval]
    else:
        digits = min(places(half, 2), places(value, 5) if value else 6, 6)
        shown = [f"{x:{sign},.{digits}f}" for x in interval]
    return f"{shown[0]}{unit} ({shown[1]} to {shown[2]})"


def change_text(ratio: Sequence[float]) -> str:
    """Format a ratio and its interval as the change in per cent: `+1.5 % (+0.7 to +2.2)`."""
    return interval_text([100 * (x - 1) for x in ratio], unit=" %", sign="+")


def error_text(error: Sequence[float]) -> str:
    """Format an error that is a share of an energy, and its interval, in per cent: `3.2 % (2.1 to 4.4)`."""
    return interval_text([100 * x for x in error], unit=" %")


def stacked(text: str) -> str:
    """Return `value (low to high)` with the interval on a line of its own, so that a table is narrow."""
    return text.replace(" (", "\n(", 1)


def percent(before: Any, after: Any) -> str:
    """Format the relative change from one number to another; "" from zero."""
    return f"{100 * (after / before - 1):+.2f} %" if before else ""


def span(values: Sequence[int]) -> str:
    """Format sorted numbers as smallest and largest, or as one number if there is only one."""
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def parse_bytes(text: str, option: str) -> float:
    """Parse `25MB`, `25MiB`, `80 GB` or `1000` as bytes. Raises InputError for anything else."""
    return _number(text, option, r"B?", "a size such as 25MB, 25MiB or 80GB")


def parse_tokens(text: str, option: str) -> int:
    """Parse `4k` or `4096` as tokens: k is 1024. Raises InputError for anything else, and below 1."""
    match = re.fullmatch(r"\s*(\d{1,12})\s*([kKM]?)\s*", text, re.A)
    tokens = int(match[1]) * {"": 1, "k": 2**10, "K": 2**10, "M": 2**20}[match[2]] if match else 0
    if tokens < 1:
        raise InputError(f"{option} {text!r}: expected a number of tokens of at least 1, such as 4k or 4096")
    return tokens


def parse_bandwidth(text: str, option: str) -> float:
    """Parse `3.35TB/s` or `900 GB/s` as bytes per second. Raises InputError for anything else."""
    return _number(text, option, r"B/s", "a rate such as 3.35TB/s or 900GB/s")


def parse_flops(text: str, option: str) -> float:
    """Parse `989TFLOP/s` or `80 GFLOPS` as operations per second. Raises InputError for anything else."""
    return _number(text, option, r"FLOP(?:/s|S)", "a rate such as 989TFLOP/s")


def parse_parameters(text: str, option: str) -> float:
    """Parse `0.8x` as a fraction, or `900M`, `1.1B`, `1100000000` as a count. Raises InputError for anything else."""
    if text.strip().endswith("x"):
        fraction = _number(text.strip()[:-1], option, r"", "a fraction such as 0.8x")
        if fraction > 1:
            raise InputError(f"{option} {text!r}: more than the model has; give a fraction up to 1x, or a count")
        return fraction
    text = re.sub(r"[Bb]\s*$", "G", text)  # billions
    count = _number(text, option, r"", "a fraction such as 0.8x, or a count such as 900M or 1.1B")
    if count <= 1:
        raise InputError(f"{option} {text!r}: is a count; a fraction has an x, {count:g}x")
    return count


def parse_increase(text: str, option: str) -> float:
    """Parse `1%` or `0.01` as a fraction. Raises InputError for anything else, and for `1`, which is 100% or 1%."""
    if text.strip().endswith("%"):
        return _number(text.strip()[:-1], option, r"", "a percentage such as 1%") / 100
    value = _number(text, option, r"", "a percentage such as 1%, or a fraction such as 0.01")
    if value >= 1:
        raise InputError(f"{option} {text}: as a fraction this is {value:.0%}; did you mean {text.strip()}%?")
    return value


def _number(text: str, option: str, suffix: str, expected: str) -> float:
    match = re.fullmatch(
        rf"\s*(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*([kMGT]i?)?\s*{suffix}\s*", text.replace("K", "k"), re.A
    )
    if match is None:
        raise InputError(f"{option} {text!r}: expected {expected}")
    value = float(match[1] + (match[2] or "")) * UNITS[match[3] or ""]
    if not (value > 0 and math.isfinite(value)):
        raise InputError(f"{option} {text!r}: must be above 0")
    return value
