"""Sections of a report with figures and tables. A section is present if its data are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite, isnan
from typing import Any

from sspruner.benchmarking.record import DECODE, TRANSFORMERS, Bench, Timing
from sspruner.comparison.record import Comparison, Cut
from sspruner.evaluation.paired import Interval
from sspruner.evaluation.result import Evaluation, Row
from sspruner.plans.plan import PlanSummary
from sspruner.pruning.report import OUTPUT_ERROR, Report
from sspruner.recipes.yaml import as_yaml
from sspruner.reporting.board import board_section
from sspruner.reporting.content import Code, Figure, Section, Table, shown
from sspruner.reporting.evaluation import STATES, stored_as
from sspruner.reporting.figures import Line, bars, lines
from sspruner.reporting.folder import Folder
from sspruner.reporting.score_sections import score_section
from sspruner.units import as_bytes, error_text, number_text, span

DENSE = -1  # style of the dense model: the last colour and marker, which no other has unless there are many
MOST_TICKS = 8
SIZE_MATCH = 0.01  # a bench row belongs to a cut if their states differ by no more than this share


def sections(folder: Folder) -> list[Section]:
    """Return all sections of a folder, the results first. Each file has its own section."""
    parts = []
    for number, (path, board) in enumerate(folder.leaderboard.items()):
        parts.append(board_section(board, f"leaderboard{number or ''}", path))
    for number, (path, compared) in enumerate(folder.compare.items()):
        several = f": {compared.model}" if len(folder.compare) > 1 else ""
        parts.append(_comparison(compared, folder.bench, f"compare{number or ''}", path, several))
    for number, (path, bench) in enumerate(folder.bench.items()):
        parts.append(_bench(bench, f"bench{number or ''}", path))
    for path, evaluated in folder.evaluation.items():
        parts.append(_evaluation(evaluated, path))
    for number, (path, cut) in enumerate((folder.report | folder.plan).items()):
        parts.append(_cut(cut, f"kept{number or ''}", path))
    if folder.scores:
        cuts = sorted({s for c in folder.compare.values() for s in c.sparsities}) or [0.25, 0.5, 0.75, 0.9]
        parts.append(score_section(folder.scores, tuple(cuts)))
    parts.append(_provenance(folder))
    return [section for section in parts if section.figures or section.tables]


def _size(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _comparison(compared: Comparison, timed: Mapping[str, Bench], name: str, path: str, several: str) -> Section:
    """Return the section of a comparison. several: the end of its title where there are comparisons of other models."""
    styles = {label: i for i, label in enumerate(compared.cells)}
    figures: list[Figure] = []
    for metric, title, level in (
        ("perplexity_ratio", "perplexity / dense", 1.0),
        ("kl_to_dense", "KL to dense, nats per token", None),
    ):
        what = "Perplexity" if level else "KL"
        plotted = [_damage(compared, metric, label, styles[label]) for label in compared.cells]
        plotted = [line for line in plotted if line.x]
        if not plotted:
            continue
        spread, kept = _spread(plotted), f"{compared.axis} kept, %"
        dense = Line("dense", [100], [Interval.exactly(level or 0.0)], DENSE)
        figures.append(
            Figure(
                f"{name}-{metric.replace('_', '-')}",
                f"{what} against what is kept",
                f"Each line is a scorer; bars are 95 % intervals. {_best(plotted, level)}",
                lines([*plotted, dense], kept, title, log_y=spread, level=level, ticks=ticks_of([*plotted, dense])),
                Table("", ("scorer", kept, title), _points(plotted)),
            )
        )
    if pareto := _by_bytes(compared, styles, name):
        figures.append(pareto)
    if speed := _by_speed(compared, timed, styles, name):
        figures.append(speed)
    note = f"{path}: {compared.model or 'a model'}, axis {compared.axis}. Lower is better in every picture."
    return Section(f"Damage of cuts{several}", note, tuple(figures), (_cells(compared),))


def _cut_points(compared: Comparison, label: str, metric: str) -> Iterable[tuple[float, Cut, Interval]]:
    for sparsity, cell in sorted(compared.cells[label].items()):
        if isinstance(cell, Cut) and metric in cell.measures:
            yield sparsity, cell, cell.measures[metric]


def _damage(compared: Comparison, metric: str, label: str, style: int) -> Line:
    points = [(100 * (1 - s), value) for s, _, value in _cut_points(compared, label, metric)]
    return Line(label, [x for x, _ in points], [y for _, y in points], style)


def _by_bytes(compared: Comparison, styles: Mapping[str, int], name: str) -> Figure | None:
    metric, plotted = "perplexity_ratio", []
    for label, style in styles.items():
        points = [(c.state_bytes / 1e6, v) for _, c, v in _cut_points(compared, label, metric)]
        if points:
            plotted.append(Line(label, [x for x, _ in points], [y for _, y in points], style))
    baseline = compared.baseline
    if not plotted:
        return None
    plotted.append(Line("dense", [compared.dense.state_bytes / 1e6], [Interval.exactly(1.0)], DENSE))
    if baseline and metric in baseline.measures:
        plotted.append(Line("smaller dense", [baseline.state_bytes / 1e6], [baseline.measures[metric]], len(styles)))
    x = "state per sequence, MB"
    return Figure(
        f"{name}-pareto-bytes",
        "Damage against state bytes",
        "Further to the left, less state." + (" The model named smaller dense was not cut." if baseline else ""),
        lines(plotted, x, "perplexity / dense", log_y=_spread(plotted), level=1.0, ticks=ticks_of(plotted)),
        Table("", ("scorer", x, "perplexity / dense"), _points(plotted)),
    )


def _by_speed(compared: Comparison, timed: Mapping[str, Bench], styles: Mapping[str, int], name: str) -> Figure | None:
    """Plot damage against decode speed at the largest batch, for cuts with a bench row of the same state size."""
    decode = [row for bench in timed.values() for row in bench.rows if row.phase == DECODE]
    joined = [
        (label, row, value)
        for label in styles
        for _, cell, value in _cut_points(compared, label, "perplexity_ratio")
        for row in decode
        if abs(cell.state_bytes - row.state_bytes) <= SIZE_MATCH * cell.state_bytes
    ]
    if not joined:
        return None
    batch = max(row.batch for _, row, _ in joined)
    plotted = []
    for label, style in styles.items():
        points = [
            (row.tokens_per_second.value, value)
            for scorer, row, value in joined
            if scorer == label and row.batch == batch
        ]
        if points:
            plotted.append(Line(label, [x for x, _ in points], [y for _, y in points], style))
    size = compared.dense.state_bytes
    if whole := [row.tokens_per_second.value for row in decode if (row.batch, row.state_bytes) == (batch, size)]:
        plotted.append(Line("dense", whole[:1], [Interval.exactly(1.0)], DENSE))
    rows = [
        (label, str(row.batch), row.model, shown(row.tokens_per_second), shown(value)) for label, row, value in joined
    ]
    return Figure(
        f"{name}-pareto-speed",
        "Damage against decode speed",
        f"At batch {batch}, the largest that was timed. Further to the right, more tokens. "
        "A cut has the speed that was measured for its size of state, whichever scorer made it.",
        lines(plotted, "decode, tokens per second", "perplexity / dense", log_y=_spread(plotted), level=1.0),
        Table("", ("scorer", "batch", "timed as", "tokens per second", "perplexity / dense"), tuple(rows)),
    )


def _cells(compared: Comparison) -> Table:
    """Return every number of the comparison."""
    rows = [("dense", "0 %", compared.dense), ("smaller dense", "0 %", compared.baseline)]
    measured = [row for _, _, row in rows if row]
    measured += [c for row in compared.cells.values() for c in row.values() if isinstance(c, Cut)]
    metrics = list(dict.fromkeys(metric for m in measured for metric in m.measures))
    table_rows: list[tuple[str, ...]] = [_cut_row(label, cut, m, metrics) for label, cut, m in rows if m]
    for label, row in compared.cells.items():
        for sparsity, cell in row.items():
            cut = f"{100 * sparsity:g} %"
            table_rows.append((label, cut, cell) if isinstance(cell, str) else _cut_row(label, cut, cell, metrics))
    head = ("scorer", "removed", "state", "parameters", *(metric.replace("_", " ") for metric in metrics))
    return Table("All numbers", head, tuple(table_rows))


def _cut_row(label: str, cut: str, cell: Cut, metrics: Sequence[str]) -> tuple[str, ...]:
    values = (shown(cell.measures.get(metric)) for metric in metrics)
    return (label, cut, as_bytes(cell.state_bytes), _size(cell.parameters), *values)


def _bench(bench: Bench, name: str, path: str) -> Section:
    figures: list[Figure] = []
    styles = {label: i for i, label in enumerate(dict.fromkeys(row.model for row in bench.rows))}
    for phase in dict.fromkeys(row.phase for row in bench.rows):
        rows = [row for row in bench.rows if row.phase == phase]
        batches = sorted({row.batch for row in rows})
        plotted = []
        for label, style in styles.items():
            timings = sorted((row for row in rows if row.model == label), key=lambda row: row.batch)
            if not timings:
                continue
            plotted.append(
                Line(label, [row.batch for row in timings], [row.tokens_per_second for row in timings], style)
            )
            bound = [(row.batch, Interval.exactly(row.ceiling)) for row in timings if not isnan(row.ceiling)]
            if len(bound) > 1:
                plotted.append(Line("", [x for x, _ in bound], [y for _, y in bound], style, dotted=True))
        if len(batches) < 2:
            continue  # the table is enough
        figures.append(
            Figure(
                f"{name}-{len(figures)}",
                f"Speed of {phase} against batch",
                "Solid: measured, medians with 95 % intervals. Dotted: its ceiling by bytes and operations moved. "
                "Higher is better, and so is closer to the dotted line of the same colour.",
                lines(plotted, "batch", "tokens per second", log_x=True, log_y=True, ticks=batches),
                _times("", rows),
            )
        )
    engine = " ".join(str((bench.engine or TRANSFORMERS)[key]) for key in ("name", "version")).rstrip()
    return Section(f"Speed in {engine}", path, tuple(figures), (_times("All numbers", bench.rows),))


def _times(title: str, rows: Sequence[Timing]) -> Table:
    head = (
        "model",
        "phase",
        "batch",
        "tokens per second",
        "ms",
        "ceiling",
        "of ceiling",
        "state",
        "peak",
        "path",
    )
    cells = tuple(
        (
            row.model,
            row.phase,
            str(row.batch),
            shown(row.tokens_per_second),
            shown(row.ms),
            "–" if isnan(row.ceiling) else number_text(row.ceiling),
            f"{100 * row.fraction:.1f} %" if row.ceiling > 0 else "–",
            as_bytes(row.state_bytes),
            "–" if row.peak_bytes is None else as_bytes(row.peak_bytes),
            row.path,
        )
        for row in rows
    )
    return Table(title, head, cells)


def _evaluation(evaluated: Evaluation, path: str) -> Section:
    tables = []
    if evaluated.by_state:
        how = stored_as(evaluated.protocol["state"])
        tables.append(_metrics(f"Recurrent state in {how}", STATES, evaluated.by_state.values()))
    if evaluated.rows:
        tables.append(_metrics("", ("value", evaluated.against or "against"), evaluated.rows))
    for what, buckets in (("position", evaluated.by_position), ("length", evaluated.by_length)):
        if buckets:
            tables.append(_buckets(f"Perplexity by {what}", buckets))
    note = f"{path}: {evaluated.model}; 95 % intervals; the change is paired on the same items"
    return Section("Quality", note, tables=tuple(tables))


def _metrics(title: str, models: tuple[str, str], metrics: Iterable[Row]) -> Table:
    """Return a row for each metric. models: the heads of the columns of values."""
    rows = tuple(
        (
            row.metric,
            shown(row.value),
            shown(row.against),
            f"{row.kind} {shown(row.change)}" if row.change else "–",
            _size(row.items),
        )
        for row in metrics
    )
    return Table(title, ("metric", *models, "change", "items"), rows)


def _buckets(title: str, buckets: Mapping[str, Row]) -> Table:
    """Return a row for each bucket, with the columns that any of them has."""
    cells = {
        name: {"value": row.value, "against": row.against, row.kind: row.change, "items": Interval.exactly(row.items)}
        for name, row in buckets.items()
    }
    columns = [
        column
        for column in ("value", "against", "ratio", "difference", "items")
        if any(row.get(column) is not None for row in cells.values())
    ]
    rows = tuple((name, *(shown(row.get(column)) for column in columns)) for name, row in cells.items())
    return Table(title, ("", *columns), rows)


def _cut(cut: Report | PlanSummary, name: str, path: str) -> Section:
    figures: list[Figure] = []
    for axis in dict.fromkeys(group.rpartition(":")[2] for group in cut.layers):
        groups = [group for group in cut.layers if group.rpartition(":")[2] == axis]
        before, after = ([cut.layers[group][when] for group in groups] for when in ("before", "after"))
        rows = tuple((g, str(b), str(a)) for g, b, a in zip(groups, before, after, strict=True))
        figures.append(
            Figure(
                f"{name}-{len(figures)}",
                f"Kept of each layer: {axis}",
                f"Of {span(sorted({*before}))} units a layer keeps {span(sorted({*after}))}; "
                f"{100 * sum(after) / max(1, sum(before)):.1f} % in all.",
                bars([str(i) for i in range(len(groups))], before, after, f"{axis} units"),
                Table("", ("layer", "before", "kept"), rows),
            )
        )
    if isinstance(cut, PlanSummary):
        return Section("What was cut", path, tuple(figures))
    if cut.refit:
        figures.append(_refit(cut.refit, f"{name}-{len(figures)}"))
    costs = tuple(
        (key.replace("_", " "), _cost(key, cut.dense.get(key)), _cost(key, cut.pruned[key]))
        for key in ("perplexity", "kl_to_dense", OUTPUT_ERROR, "parameters", "weight_bytes", "state_bytes")
        if key in cut.pruned
    )
    note = f"{path}{': ' if cut.model else ''}{cut.model}"
    return Section("What was cut", note, tuple(figures), (Table("What it cost", ("", "before", "after"), costs),))


def _refit(refit: Mapping[str, Any], name: str) -> Figure:
    """Draw the error of each refitted layer before and after; of a reconstruction, on held-out text."""
    errors, layers = refit["errors"], refit.get("layers", {})
    before, after = ([pair[i] for pair in errors.values()] for i in range(2))
    head = ("layer", "before", "after", *(("step kept", "steps", "seconds", "ended early") if layers else ()))
    rows = []
    for path, (start, end) in errors.items():
        row: tuple[str, ...] = (path, number_text(start), number_text(end))
        if path in layers:
            one = layers[path]
            row += (str(one["step"]), str(one["steps"]), f"{one['seconds']:.1f}", one["stopped"] or "no")
        rows.append(row)
    where = "on held-out text" if layers else "on calibration text"
    return Figure(
        name,
        f"Error of each layer before and after refit {refit['kind']}",
        f"Squared error of what a layer puts out, over the energy of what the dense one does, {where}: the sum falls "
        f"from {number_text(sum(before))} to {number_text(sum(after))}.",
        bars([str(i) for i in range(len(errors))], before, after, "relative squared error", "after"),
        Table("", head, tuple(rows)),
    )


def _cost(key: str, value: Any) -> str:
    if value is None:
        return "–"
    if key == OUTPUT_ERROR:
        return error_text(value)
    if key.endswith("_bytes"):
        return as_bytes(value)
    return f"{value:,.0f}" if float(value).is_integer() else number_text(value)


def _provenance(folder: Folder) -> Section:
    keys = list(dict.fromkeys(key for origin in folder.origin.values() for key in origin))
    rows = tuple((path, *(origin.get(key, "") or "–" for key in keys)) for path, origin in folder.origin.items())
    return Section("Where this comes from", "", tables=(Table("", ("file", *keys), rows),), code=_made_by(folder))


def _made_by(folder: Folder) -> tuple[Code, ...]:
    """Return the command of each file, and the recipe of those that have one."""
    recipes = {path: report.recipe for path, report in folder.report.items()}
    recipes |= {path: compared.recipe.to_json() for path, compared in folder.compare.items() if compared.recipe}
    code = []
    for path, origin in folder.origin.items():
        if command := origin.get("command"):
            code.append(Code(f"The command of {path}", command))
        if recipe := recipes.get(path):
            code.append(Code(f"The recipe of {path}", as_yaml(recipe)))
    return tuple(code)


def ticks_of(plotted: Sequence[Line]) -> list[float]:
    """Return where the points of all lines are, if they are few: then the ticks are there."""
    places = sorted({x for line in plotted for x in line.x})
    return places if len(places) <= MOST_TICKS else []


def _points(plotted: Sequence[Line]) -> tuple[tuple[str, ...], ...]:
    return tuple((l.label, number_text(x), shown(y)) for l in plotted for x, y in zip(l.x, l.y, strict=True))  # noqa: E741


def _spread(plotted: Sequence[Line]) -> bool:
    """Check whether values differ so much that a logarithmic scale is better."""
    values = [y[0] for line in plotted for y in line.y if isfinite(y[0])]
    return bool(values) and min(values) > 0 and max(values) > 5 * min(values)


def _best(plotted: Sequence[Line], level: float | None) -> str:
    """Return a sentence on the scorer with the least damage at the deepest cut. level: that of the dense model."""
    deepest = min(x for line in plotted for x in line.x)
    at = {
        line.label: y[0]
        for line in plotted
        for x, y in zip(line.x, line.y, strict=True)
        if x == deepest and isfinite(y[0])
    }
    if not at:
        return ""
    best = min(at, key=lambda label: at[label])
    value = number_text(at[best]) if level is None else f"{100 * (at[best] / level - 1):+.2f} %"
    return f"With {deepest:.3g} % kept, least with {best}: {value}."
