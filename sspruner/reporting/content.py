"""What a report is made of: sections, figures and tables."""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan

from sspruner.evaluation.paired import Interval
from sspruner.reporting.figures import Draw


@dataclass(frozen=True)
class Table:
    """Cells as text; of a row that is shorter than the head the last cell spans the rest."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Figure:
    """A picture, what it shows in a sentence or two, and its numbers. name: of its PNG, unique in a report."""

    name: str
    title: str
    says: str
    draw: Draw
    table: Table


@dataclass(frozen=True)
class Section:
    """A heading, a line below it, figures, and tables."""

    title: str
    note: str
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()


def shown(value: Interval | None) -> str:
    """A value with its interval, where that is wider than nothing."""
    if value is None or isnan(value[0]):
        return "–"
    middle, low, high = value
    if low == high == middle:
        return number_text(middle)
    return f"{number_text(middle)} ({number_text(low)} to {number_text(high)})"


def number_text(value: float) -> str:
    """Five digits, or all before the point."""
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.5g}"
