"""Report sections on scores: heat maps of layers and units, spectra, and the agreement of scorers."""

from __future__ import annotations

from collections.abc import Mapping
from math import log10, nan

import torch

from sspruner.axes import ELEMENT_AXES
from sspruner.evaluation.paired import Interval
from sspruner.reporting.agreement import agreement, telling
from sspruner.reporting.content import Figure, Section, Table
from sspruner.reporting.figures import Line, heat, lines, spectra
from sspruner.scoring.scores import Scores
from sspruner.units import number_text

DECADES = 3  # range of a heat map: scores below a thousandth of the layer's best have the darkest colour


def score_section(scores: Mapping[str, Scores], sparsities: tuple[float, ...]) -> Section:
    """Return every scorer's heat maps, spectra of scorers whose importance is one, and the agreement of scorers."""
    figures = []
    for number, (label, scored) in enumerate(scores.items()):
        for axis, rows in by_axis(scored).items():
            figures.append(_heat(f"scores{number}-{axis}", label, axis, rows))
            if what := scored.metadata.get("spectrum"):
                figures.append(_spectra(f"spectrum{number}-{axis}", label, what, rows))
    if figure := _agreement(scores, sparsities):
        figures.insert(0, figure)
    return Section("Scores", "The importance of every unit; higher is kept.", tuple(figures))


def by_axis(scores: Scores) -> dict[str, dict[str, torch.Tensor]]:
    """Return axis -> row -> importance (units,).

    A row is a layer, or a set of its units; single elements are left out.
    """
    by_axis_name: dict[str, dict[str, torch.Tensor]] = {}
    for name, importance in scores.importance.items():
        axis = name.rpartition(":")[2]
        if axis in ELEMENT_AXES or not importance.numel():
            continue
        rows = by_axis_name.setdefault(axis, {})
        for number, row in enumerate(importance.double()):
            rows[f"{name.rpartition(':')[0] or name}{f' set {number}' if len(importance) > 1 else ''}"] = row
    return by_axis_name


def short_names(rows: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the numbers of rows, as ticks; full names are in the table."""
    return [str(number) for number in range(len(rows))]


def below_best(row: torch.Tensor) -> list[float]:
    """Return orders of magnitude below the largest of a row, at most DECADES, also for values that are not positive."""
    best = float(row.max())
    return [max(-float(DECADES), log10(v / best)) if v > 0 and v / best > 0 else -float(DECADES) for v in row.tolist()]


def _heat(name: str, label: str, axis: str, rows: Mapping[str, torch.Tensor]) -> Figure:
    width = max(len(row) for row in rows.values())
    values = [below + [nan] * (width - len(below)) for below in map(below_best, rows.values())]
    table = [
        (
            row,
            str(len(v)),
            *(number_text(float(x)) for x in (v.max(), v.median(), v.min())),
            str(int((v > v.max() / 10).sum())),
        )
        for row, v in rows.items()
    ]
    return Figure(
        name,
        f"Scores of {label}: layers and {axis} units",
        "Bright: near the best of its layer. Dark: a tenth, a hundredth, a thousandth of it or less. A row with few "
        "bright units can be cut far.",
        heat(values, short_names(rows), f"{axis} unit", -float(DECADES), "share of the layer's best score"),
        Table("", ("layer", "units", "largest", "median", "smallest", "within a tenth of the largest"), tuple(table)),
    )


def _spectra(name: str, label: str, what: str, rows: Mapping[str, torch.Tensor]) -> Figure:
    falling = [row.sort(descending=True).values for row in rows.values()]
    relative = [(row / row[0]).tolist() if row[0] > 0 else row.tolist() for row in falling]
    table = [
        (
            layer,
            number_text(float(row[0])),
            number_text(float(row[-1])),
            str(_within(row, 0.9)),
            str(_within(row, 0.99)),
        )
        for layer, row in zip(rows, falling, strict=True)
    ]
    return Figure(
        name,
        f"{what} of each layer, by {label}",
        "Sorted, over the largest of the layer; early layers dark, late ones bright. A line that falls steeply is a "
        "layer whose state few directions carry.",
        spectra(relative, short_names(rows), "direction", f"{what} / largest"),
        Table("", ("layer", "largest", "smallest", "carry 90 % of the sum", "carry 99 %"), tuple(table)),
    )


def _within(row: torch.Tensor, share: float) -> int:
    """Return how many of the largest values make up a share of the sum."""
    total = row.clamp_min(0).cumsum(0)
    return int((total < share * total[-1]).sum()) + 1 if total[-1] > 0 else 0


def _agreement(scores: Mapping[str, Scores], sparsities: tuple[float, ...]) -> Figure | None:
    pairs = agreement(scores, sparsities)
    if not pairs:
        return None
    cuts = [100 * s for s in sparsities]
    drawn = [
        Line(f"{a}, {b}", cuts, [Interval.exactly(100 * share) for share in pairs[a, b]], style)
        for style, (a, b) in enumerate(telling(pairs, scores))
    ]
    chance = Line("by chance", cuts, [Interval.exactly(cut) for cut in cuts], 6, dotted=True)
    rows = tuple((a, b, *(f"{number_text(100 * share)} %" for share in shares)) for (a, b), shares in pairs.items())
    return Figure(
        "agreement",
        "Do scorers agree?",
        "Of the units that one scorer keeps, the share that the other removes at the same cut. Drawn are pairs of a "
        "rank by weights alone and one that text was calibrated for, where there are both; the table has all pairs.",
        lines([*drawn, chance], "removed, %", "displaced, %", ticks=cuts),
        Table("", ("scorer", "and", *(f"{cut:g} % removed" for cut in cuts)), rows),
    )
