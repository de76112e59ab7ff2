"""Pictures of a model's layers in a terminal: bars of units kept, and heat maps of scores, in colour if possible."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.style import Style

from sspruner.graph.trace import trace
from sspruner.plans.plan import Plan
from sspruner.plans.tensors import FOLDER
from sspruner.reporting.score_sections import DECADES, below_best, by_axis
from sspruner.scoring.scores import Scores
from sspruner.surgery.record import recorded

BLOCKS, ASCII = " ▁▂▃▄▅▆▇█", " .:-=+*#%@"
CIVIDIS = ((0, 34, 78), (66, 78, 108), (124, 123, 120), (187, 173, 108), (254, 232, 56))  # dark is low
LABEL = 24  # characters of a layer's name that are shown, from its end


@dataclass(frozen=True)
class Bars:
    """A bar for each layer: units kept, in front of the units before the cut. sizes: name -> (before, now)."""

    title: str
    sizes: Mapping[str, tuple[int, int]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        full, empty = ("#", ".") if options.ascii_only else ("█", "░")
        most = max(was for was, _ in self.sizes.values())
        column = _column(self.sizes)
        room = max(8, min(60, options.max_width - column - 2 - len(f" {most} of {most}")))
        yield from _line(self.title, Style(bold=True))
        for name, (was, now) in self.sizes.items():
            long, short = round(room * was / most), round(room * now / most)
            label = f" {now}" if now == was else f" {now} of {was}"
            yield Segment(_label(name, column))
            yield Segment(full * short, Style(color=Color.parse("cyan")))
            yield from _line(f"{empty * (long - short)}{label}", Style())


@dataclass(frozen=True)
class Heat:
    """A row for each layer: how far scores are below the layer's best, as colour or as a character's weight."""

    title: str
    rows: Mapping[str, Sequence[float]]  # orders of magnitude below the best, from -DECADES to 0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widest = max(len(row) for row in self.rows.values())
        column = _column(self.rows)
        each = ceil(widest / max(8, options.max_width - column - 2))  # units in one character
        coloured = console.color_system in ("256", "truecolor") and not options.ascii_only
        yield from _line(self.title, Style(bold=True))
        for name, row in self.rows.items():
            yield Segment(_label(name, column))
            for start in range(0, len(row), each):
                part = row[start : start + each]
                level = 1 + sum(part) / len(part) / DECADES  # 0 to 1
                if coloured:
                    yield Segment("█", Style(color=Color.from_rgb(*_colour(level))))
                else:
                    yield Segment(_character(level, ASCII if options.ascii_only else BLOCKS))
            yield Segment.line()
        scale = f"a thousandth of the layer's best or less to the best; {each} units a character"
        key = ASCII if options.ascii_only else BLOCKS
        yield from _line(scale if coloured else f"'{key}': {scale}", Style(dim=True))


def plots(model: Any, folder: str | Path | None, plan: Plan | None = None) -> list[Bars | Heat]:
    """Return all pictures of a model: each layer's size before recorded cuts, now, and with `plan`; and its scores.

    folder: the model's folder; may have `sspruner/scores.safetensors`. Raises InputError if that is damaged.
    """
    drawn = [*bars(sizes_of(model, plan))]
    path = Path(folder or "").expanduser() / FOLDER / "scores.safetensors"
    return [*drawn, *heats(Scores.load(path))] if folder and path.is_file() else [*drawn]


def sizes_of(model: Any, plan: Plan | None = None) -> dict[str, tuple[int, int]]:
    """Return each group's units before any recorded cut, and now or with a plan; removed groups are left out."""
    sizes = {name: (group.units, group.units) for name, group in trace(model).groups.items() if not group.tensor}
    first: dict[str, int] = {}
    for cut in recorded(model.config):
        for name, reduction in cut.plan.groups.items():
            first.setdefault(name, reduction.before)
    sizes = {name: (max(first.get(name, now), now), now) for name, (_, now) in sizes.items()}
    for name, reduction in (plan.groups if plan else {}).items():
        sizes[name] = (sizes[name][0], reduction.after)
    return sizes


def bars(sizes: Mapping[str, tuple[int, int]]) -> list[Bars]:
    """Return a picture for each axis that was cut or whose layers differ; for every axis, if there is none such.

    sizes: dependency group -> units before and now.
    """
    sizes_by_axis = {name.rpartition(":")[2]: set[tuple[int, int]]() for name in sizes}
    for name, size in sizes.items():
        sizes_by_axis[name.rpartition(":")[2]].add(size)
    axes = [axis for axis, some in sizes_by_axis.items() if len(some) > 1 or any(was != now for was, now in some)]
    return [
        Bars(
            f"{axis} units kept",
            {n.rpartition(":")[0] or n: s for n, s in sizes.items() if n.rpartition(":")[2] == axis},
        )
        for axis in axes or sizes_by_axis
    ]


def heats(scores: Scores) -> list[Heat]:
    """Return a picture for each axis that was scored."""
    name = scores.metadata.get("scorer", "")
    return [
        Heat(f"scores{f' of {name}' if name else ''}: {axis} units", {n: below_best(row) for n, row in rows.items()})
        for axis, rows in by_axis(scores).items()
    ]


def _colour(level: float) -> tuple[float, float, float]:
    place = min(1.0, max(0.0, level)) * (len(CIVIDIS) - 1)
    low = min(int(place), len(CIVIDIS) - 2)
    a, b = CIVIDIS[low], CIVIDIS[low + 1]
    red, green, blue = (x + (y - x) * (place - low) for x, y in zip(a, b, strict=True))
    return red, green, blue


def _character(level: float, scale: str) -> str:
    return scale[min(len(scale) - 1, int(max(0.0, level) * len(scale)))]


def _column(names: Iterable[str]) -> int:
    """Return the width of the column of layer names."""
    return min(LABEL, max(map(len, names)))


def _label(name: str, width: int) -> str:
    """Pad or cut a name to a width, keeping its end, where layers differ."""
    return f"{name[-width:]:{width}}  "


def _line(text: str, style: Style) -> RenderResult:
    yield Segment(text, style)
    yield Segment.line()
