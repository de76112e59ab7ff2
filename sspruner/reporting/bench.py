"""Tables of a bench: every row with its ceiling, and the time of a decode step by operation."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sspruner.benchmarking.record import TRANSFORMERS, Bench
from sspruner.units import as_bytes, interval_text, stacked

OPERATIONS = 12  # number of operations shown of a profile


def bench_table(bench: Bench) -> RenderableType:
    """Return one table for each phase, the profile if there is one, and the machine."""
    machine = bench.machine
    rates = f"{as_bytes(machine['bandwidth'])}/s, {machine['flops'] / 1e9:,.1f} GFLOP/s"
    how = f", {' and '.join(machine['measured'])} measured in this run" if machine["measured"] else ""
    engine = bench.engine or TRANSFORMERS  # files of before had no other
    paths = dict.fromkeys(f"{row.model}, {row.phase}: {row.path}" for row in bench.rows)
    states = dict.fromkeys(f"{row.model}: {as_bytes(row.state_bytes)} of state per sequence" for row in bench.rows)
    lines = [
        f"engine: {engine['name']} {engine['version']}".rstrip(),
        *engine["notes"],
        f"{machine['name']} ({machine['device']}), {machine['threads']} threads; ceiling: {rates}{how}",
        f"prompt {bench.prompt}, {bench.generate} steps; medians of {bench.repeats} repeats, in turns; seed "
        f"{bench.seed}",
        *states,
        *paths,
        *(f"{one['model']}, batch {one['batch']}: {one['error']}" for one in bench.failed),
    ]
    phases = [_phase(bench, phase) for phase in dict.fromkeys(row.phase for row in bench.rows)]
    return Group(*phases, *_profile(bench), *map(Text, lines))


def _phase(bench: Bench, phase: str) -> Table:
    """Return the table of one phase, with speed-ups over the first model of the run."""
    rows = [row for row in bench.rows if row.phase == phase]
    memory, size = ("cache", "cache_bytes") if rows[0].cache_bytes else ("peak", "peak_bytes")  # of a sequence; of all
    table = Table(title=phase, title_justify="left")
    for header in ("batch", "model", "ms", "tokens/s", "speed-up", "reached", memory):
        table.add_column(header, justify="left" if header == "model" else "right", overflow="fold")
    first: dict[int, str] = {}
    for row in rows:
        base = first.setdefault(row.batch, row.model)
        used = getattr(row, size)
        table.add_row(
            f"{row.batch:,}",
            escape(row.model),
            stacked(interval_text(row.ms)),
            f"{row.tokens_per_second.value:,.0f}",
            ""
            if row.model == base
            else stacked(interval_text(row.speedup(bench.row(base, row.batch, phase)), unit="x")),
            f"{100 * row.fraction:.2g} %",
            "" if used is None else as_bytes(used),
        )
    return table


def _profile(bench: Bench) -> list[RenderableType]:
    """Return a table of operations by time, the models side by side."""
    if not bench.profile:
        return []
    table = Table(title="one decode step, largest batch: ms (calls) by operation", title_justify="left")
    table.add_column("operation")
    for label in bench.profile:
        table.add_column(escape(label), justify="right")
    spent = {label: {row["operation"]: row for row in rows} for label, rows in bench.profile.items()}
    names = dict.fromkeys(row["operation"] for rows in bench.profile.values() for row in rows[:OPERATIONS])
    for name in sorted(names, key=lambda n: -max(rows[n]["ms"] if n in rows else 0 for rows in spent.values())):
        cells = [f"{rows[name]['ms']:.2f} ({rows[name]['calls']:g})" if name in rows else "" for rows in spent.values()]
        table.add_row(escape(name), *cells)
    table.add_row("all", *(f"{sum(row['ms'] for row in rows.values()):.2f}" for rows in spent.values()))
    return [table]
