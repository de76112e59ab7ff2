"""Medians of a few repeats, with distribution-free confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from statistics import median

from sspruner.evaluation.paired import Interval

COVERAGE = 0.95


def median_interval(values: Sequence[float]) -> Interval:
    """Return the median with the order statistics that enclose the true median with 95 % confidence.

    With fewer than six values none do; then the minimum and the maximum are returned.
    """
    ordered = sorted(values)
    n, dropped = len(ordered), 0
    while 1 - 2 * _at_most(dropped + 1, n) >= COVERAGE:
        dropped += 1
    return Interval(float(median(ordered)), ordered[dropped], ordered[n - 1 - dropped])


def _at_most(k: int, n: int) -> float:
    """Return the probability of at most k heads among n fair coins."""
    return sum(comb(n, i) for i in range(k + 1)) / 2.0**n
