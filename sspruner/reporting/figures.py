"""Figures with matplotlib: lines, bars, heat maps; as SVG with colours from the page, and as PNG."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from sspruner.evaluation.paired import Interval
from sspruner.units import number_text


@dataclass(frozen=True)
class Palette:
    """Colours of a figure: text, grid, and series that differ for any colour vision (Okabe and Ito)."""

    ink: str
    grid: str
    series: tuple[str, ...]


LIGHT = Palette("#1d2330", "#d5d9e0", ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7a7f87"))
# Placeholders that become var(--ink) and so on, so that one SVG serves light and dark pages.
MARKED = Palette("#010100", "#010101", tuple(f"#0102{i:02x}" for i in range(len(LIGHT.series))))
VARIABLES = {MARKED.ink: "ink", MARKED.grid: "grid", **{c: f"series-{i}" for i, c in enumerate(MARKED.series)}}

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
WIDTH, DPI = 5.2, 160  # inches: 374 points, so that text on a phone keeps about its size

Draw = Callable[[Palette], Any]


@dataclass(frozen=True)
class Line:
    """Points with intervals. style: index among the series. dotted: a bound, without markers."""

    label: str
    x: Sequence[float]
    y: Sequence[Interval]
    style: int
    dotted: bool = False


def lines(
    series: Sequence[Line], x: str, y: str, *, log_x: bool = False, log_y: bool = False, level: float | None = None,
    connected: bool = True, ticks: Sequence[float] = (),
) -> Draw:  # fmt: skip
    """Return a figure of lines or points. level: a reference value. Points that are not finite are left out.

    With a value of 0 among them, a logarithmic scale is linear from there to the smallest other value.
    """
    values_of_all = [b[0] for line in series for b in line.y if isfinite(b[0])]
    smallest = min((y for y in values_of_all if y > 0), default=None)
    to_zero = log_y and smallest is not None and 0 in values_of_all

    def draw(palette: Palette) -> Any:
        from matplotlib.ticker import FuncFormatter

        figure, ax = _axes(palette)
        log_of_y = log_y and not to_zero
        for line in series:
            points = [(a, b) for a, b in zip(line.x, line.y, strict=True) if _shown(a, b[0], log_x, log_of_y)]
            if not points:
                continue
            at, values = [a for a, _ in points], [b[0] for _, b in points]
            errors = [
                [max(0.0, b[0] - low) if _shown(1, low, False, log_of_y) else 0.0 for _, b in points for low in [b[1]]],
                [max(0.0, b[2] - b[0]) if isfinite(b[2]) else 0.0 for _, b in points],
            ]
            count = len(palette.series)
            style: dict[str, Any] = {"color": palette.series[line.style % count], "label": _label(line.label)}
            if not line.label:
                del style["label"]  # not in the legend
            if line.dotted:
                ax.plot(at, values, linestyle=":", linewidth=1.2, **style)
                continue
            dash = DASHES[line.style // count % len(DASHES)] if connected and len(at) > 1 else "none"
            mark = MARKERS[line.style % len(MARKERS)]
            ax.errorbar(at, values, yerr=errors, marker=mark, markersize=4.5, linestyle=dash, capsize=2.5,
                        linewidth=1.6, elinewidth=1, **style)  # fmt: skip
        if level is not None:
            ax.axhline(level, color=palette.ink, linewidth=0.8, linestyle=":")
        _scale(ax.xaxis, ax.set_xscale, log_x)
        _scale(ax.yaxis, ax.set_yscale, log_y)
        if to_zero:
            ax.set_yscale("symlog", linthresh=smallest)
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number_text(value)))
            ax.set_ylim(bottom=0)
        if ticks:
            ax.set_xticks(list(ticks), [f"{tick:.3g}" for tick in ticks], minor=False)
            ax.set_xticks([], minor=True)
        ax.set(xlabel=x, ylabel=y)
        _legend(figure, ax)
        return figure

    return draw


def bars(names: Sequence[str], before: Sequence[float], after: Sequence[float], y: str, what: str = "kept") -> Draw:
    """Return a bar chart, `after` in front of `before`. what: the name of `after`."""

    def draw(palette: Palette) -> Any:
        figure, ax = _axes(palette)
        ax.bar(range(len(names)), before, color=palette.grid, label="before", width=0.8)
        ax.bar(range(len(names)), after, color=palette.series[0], label=what, width=0.8)
        _name_ticks(ax.set_xticks, names)
        ax.set(xlabel="layer", ylabel=y)
        ax.grid(False, axis="x")
        _legend(figure, ax)
        return figure

    return draw


def heat(values: Sequence[Sequence[float]], names: Sequence[str], x: str, low: float, label: str) -> Draw:
    """Return a heat map of rows of decades, from `low`, a whole number, to 0; NaN where a row is shorter."""

    def draw(palette: Palette) -> Any:
        figure, ax = _axes(palette, height=min(7.0, 1.5 + 0.16 * len(values)))
        shown = ax.imshow(values, cmap="cividis", vmin=low, vmax=0, aspect="auto", interpolation="none")
        bar = figure.colorbar(shown, ax=ax, location="bottom", shrink=0.7, aspect=36, label=label)
        decades = range(round(low), 1)
        bar.set_ticks(list(decades), labels=[f"1/{10**-d:,}" if d else "best" for d in decades])
        bar.outline.set_visible(False)
        bar.ax.tick_params(color=palette.ink)
        ax.grid(False)
        _name_ticks(ax.set_yticks, names)
        ax.set(xlabel=x, ylabel="layer")
        return figure

    return draw


def spectra(rows: Sequence[Sequence[float]], names: Sequence[str], x: str, y: str) -> Draw:
    """Return a figure with a falling line for each layer, first layers dark and last ones bright."""

    def draw(palette: Palette) -> Any:
        from matplotlib import colormaps

        figure, ax = _axes(palette)
        for i, (name, row) in enumerate(zip(names, rows, strict=True)):
            shown = [value if value > 0 else float("nan") for value in row]
            colour = colormaps["viridis"](0.2 + 0.6 * i / max(1, len(rows) - 1))
            ax.plot(range(1, len(row) + 1), shown, color=colour, linewidth=1.3, label=_label(f"layer {name}"))
        _scale(ax.yaxis, ax.set_yscale, log=True)
        ax.set(xlabel=x, ylabel=y)
        if len(rows) <= 12:
            _legend(figure, ax)
        return figure

    return draw


def svg(draw: Draw, name: str) -> str:
    """Render a figure as an SVG element whose colours are the page's variables, and whose ids begin with `name`."""
    text = _rendered(draw, MARKED, "svg", salt=name).decode()
    text = text[text.index("<svg") :]
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r"<svg \1", text.replace("\n", " "), count=1)
    text = re.sub(r'<svg height="[^"]*" width="[^"]*" ', "<svg ", text)
    return text.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)


def png(draw: Draw) -> bytes:
    """Render a figure as PNG, on white."""
    return _rendered(draw, LIGHT, "png", salt="")


def _rendered(draw: Draw, palette: Palette, kind: str, salt: str) -> bytes:
    import matplotlib

    settings: Any = {
        "font.size": 10, "axes.labelsize": 10, "text.color": palette.ink, "axes.labelcolor": palette.ink,
        "axes.edgecolor": palette.ink, "xtick.color": palette.ink, "ytick.color": palette.ink,
        "text.parse_math": False, "svg.hashsalt": salt, "axes.facecolor": "none",
    }  # fmt: skip
    out = io.BytesIO()
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a character that the font lacks
        how = {"metadata": {"Date": None}, "transparent": True} if kind == "svg" else {"facecolor": "white", "dpi": DPI}
        draw(palette).savefig(out, format=kind, **how)
    return out.getvalue()


def _axes(palette: Palette, height: float = 3.4) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    ax = figure.subplots()
    ax.set_axisbelow(True)
    ax.grid(True, color=palette.grid, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    return figure, ax


def _legend(figure: Any, ax: Any) -> None:
    """Add a legend below the axes, and grow the figure by its height, so that the axes keep their size."""
    handles, labels = ax.get_legend_handles_labels()
    if labels:
        columns = 3 if max(map(len, labels)) <= 14 else 2 if max(map(len, labels)) <= 24 else 1
        figure.set_figheight(figure.get_figheight() + 0.2 * (-(-len(labels) // columns) - 1))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _label(text: str) -> str:
    """Shorten a name for a legend, and hide a leading underscore, which would make matplotlib leave it out."""
    text = text if len(text) <= 36 else f"{text[:35]}…"
    return f" {text}" if text.startswith("_") or not text else text


def _name_ticks(set_ticks: Callable[..., Any], names: Sequence[str]) -> None:
    """Set at most 16 tick labels."""
    step = -(-len(names) // 16)
    set_ticks(range(0, len(names), step), [_label(name) for name in names[::step]])


def _scale(axis: Any, set_scale: Callable[[str], None], log: bool) -> None:
    """Set few ticks, as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogFormatter, MaxNLocator

    if log:
        set_scale("log")
        axis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    else:
        axis.set_major_locator(MaxNLocator(6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _shown(x: float, y: float, log_x: bool, log_y: bool) -> bool:
    return isfinite(x) and isfinite(y) and (x > 0 or not log_x) and (y > 0 or not log_y)
