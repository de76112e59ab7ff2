"""Content of a report: sections, figures and tables."""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan

from sspruner.evaluation.paired import Interval
from sspruner.reporting.figures import Draw
from sspruner.units import interval_text


@dataclass(frozen=True)
class Table:
    """A table of texts; in a row that is shorter than the head, the last cell spans the rest."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Figure:
    """A picture, its caption of a sentence or two, and its numbers. name: of its PNG, unique in a report."""

    name: str
    title: str
    says: str
    draw: Draw
    table: Table


@dataclass(frozen=True)
class Code:
    """A command or a file, to be copied."""

    title: str
    text: str


@dataclass(frozen=True)
class Section:
    """A heading, a line below it, figures, tables, and what can be copied."""

    title: str
    note: str
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    code: tuple[Code, ...] = ()


def shown(value: Interval | None) -> str:
    """Format a value with its interval, if the interval has a width."""
    if value is None or isnan(value[0]):
        return "–"
    return interval_text(value)
