"""Picture of a leaderboard: damage against the state that is kept, a line for each recipe, a panel for each model."""

from __future__ import annotations

from math import isfinite
from typing import Any

from sspruner.comparison.board import RATIO, Entry, Leaderboard
from sspruner.reporting.content import Figure, Section, Table
from sspruner.reporting.figures import DASHES, MARKERS, WIDTH, Draw, Palette

PANEL = 2.1  # inches high
LINEAR = 1.0  # per cent: the scale is linear up to here, logarithmic beyond, for rows differ by factors of a hundred


def picture(board: Leaderboard) -> Draw:
    """Return the picture. Bars are 95 % intervals; every line ends in the dense model."""
    models = [model for model in board.settings.models if model in board.dense]

    def draw(palette: Palette) -> Any:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH, PANEL * max(1, len(models)) + 0.2 * len(board.rows)), layout="constrained")
        panels = figure.subplots(max(1, len(models)), 1, squeeze=False, sharex=True)[:, 0]
        for ax, model in zip(panels, models, strict=False):
            for style, label in enumerate(sorted(board.rows)):
                _curve(ax, board, (model, label), _style(palette, style))
            ax.set(title=model, xlim=(0, 104), ylabel="change, %")
            _scale(ax, _lowest(board, model))
            ax.grid(True, color=palette.grid, linewidth=0.6)
            ax.spines[["top", "right"]].set_visible(False)
        panels[-1].set_xlabel("state kept, %; change is of perplexity")
        if models:
            figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", frameon=False, fontsize=9)
        return figure

    return draw


def _lowest(board: Leaderboard, model: str) -> float:
    """Return the lowest end of an interval of a model's cuts, in per cent; 0 if all are above."""
    cuts = [cut for row in board.rows.values() for cut in row.entries.get(model, {}).values()]
    lows = [100 * (cut.measures[RATIO].low - 1) for cut in cuts if isinstance(cut, Entry)]
    return min([0.0, *filter(isfinite, lows)])


def _scale(ax: Any, lowest: float) -> None:
    """Set the scale of damage, with plain numbers at its decades."""
    from matplotlib.ticker import FuncFormatter, SymmetricalLogLocator

    ax.set_yscale("symlog", linthresh=LINEAR, linscale=0.5)
    ax.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=LINEAR))
    ax.set_ylim(bottom=1.1 * lowest - 0.2 * LINEAR)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+,g}" if value else "0"))


def _style(palette: Palette, number: int) -> dict[str, Any]:
    count = len(palette.series)
    dash, mark = DASHES[number // count % len(DASHES)], MARKERS[number % len(MARKERS)]
    return {"color": palette.series[number % count], "linestyle": dash, "marker": mark}


def _curve(ax: Any, board: Leaderboard, which: tuple[str, str], style: dict[str, Any]) -> None:
    """Draw a recipe's cuts of a model that have a finite damage; without any, only its place in the legend.

    which: model and label. An interval without an end is drawn without a bar there.
    """
    model, label = which
    cuts = [cut for cut in board.rows[label].entries.get(model, {}).values() if isinstance(cut, Entry)]
    dense = max(1, board.dense[model].state_bytes)
    cuts = [cut for cut in cuts if isfinite(cut.measures[RATIO].value)]
    points = sorted((100 * cut.state_bytes / dense, [100 * (x - 1) for x in cut.measures[RATIO]]) for cut in cuts)
    points += [(100.0, [0.0, 0.0, 0.0])] if points else []
    kept, values = [x for x, _ in points], [value for _, (value, _, _) in points]
    bars = [[_finite(abs(found[end] - found[0])) for _, found in points] for end in (1, 2)]
    ax.errorbar(kept, values, yerr=bars, label=label, markersize=4.5, capsize=2.5, linewidth=1.4, **style)


def _finite(length: float) -> float:
    return length if isfinite(length) else 0.0


def board_section(board: Leaderboard, name: str, path: str) -> Section:
    """Return the section of a leaderboard in a report: the picture, and a table for each model."""
    tables = tuple(Table(title, head, tuple(map(tuple, rows))) for title, head, rows in board.tables())
    says = "Each line is a recipe, and ends in the dense model; bars are 95 % intervals; logarithmic beyond 1 %."
    figures = (
        (Figure(name, "Damage against the state that is kept", says, picture(board), tables[0]),) if tables else ()
    )
    return Section("Leaderboard", f"{path}: {board.notes()[0]}.", figures, tables[1:])
