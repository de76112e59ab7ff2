"""Tables of a comparison and of a leaderboard for the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sspruner.comparison.board import Leaderboard
from sspruner.comparison.record import Comparison
from sspruner.units import stacked


def comparison_table(comparison: Comparison) -> RenderableType:
    """Return a table for each measure, a row for each scorer, a column for each cut; then the notes.

    Intervals stand below their values, so that four cuts fit into 80 columns.
    """
    parts: list[RenderableType] = []
    for title, head, rows in comparison.tables():
        table = Table(title=f"{escape(comparison.model)}: axis {comparison.axis}; {title}", title_justify="left")
        for name in head:
            table.add_column(name, justify="left" if name == head[0] else "right")
        for row in rows:
            table.add_row(escape(row[0]), *(stacked(escape(cell)) for cell in row[1:]))
        parts.append(table)
    return Group(*parts, *map(Text, comparison.notes()))


def board_table(board: Leaderboard) -> RenderableType:
    """Return a table for each model, a row for each recipe and cut; then the notes."""
    parts: list[RenderableType] = []
    for title, head, rows in board.tables():
        table = Table(title=escape(title), title_justify="left")
        for number, name in enumerate(head):
            table.add_column(name, justify="right" if 0 < number < len(head) - 1 else "left")
        for row in rows:
            table.add_row(escape(row[0]), *(stacked(escape(cell)) for cell in row[1:]))
        parts.append(table)
    return Group(*parts, *map(Text, board.notes()))
