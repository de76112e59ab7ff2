"""A comparison as tables that people can read in a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sspruner.comparison.record import Comparison


def comparison_table(found: Comparison) -> RenderableType:
    """For each measure a table: a row for each scorer, a column for each cut; then what it rests on."""
    parts: list[RenderableType] = []
    for title, head, rows in found.tables():
        table = Table(title=f"{escape(found.model)}: axis {found.axis}; {title}", title_justify="left")
        for name in head:
            table.add_column(name, justify="left" if name == head[0] else "right")
        for row in rows:
            table.add_row(*map(escape, row))
        parts.append(table)
    return Group(*parts, *map(Text, found.notes()))
