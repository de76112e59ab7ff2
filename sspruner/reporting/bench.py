"""A bench as tables that people can read: every row beside its ceiling, and where the time of a step goes."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sspruner.benchmarking.record import Bench
from sspruner.units import as_bytes

OPERATIONS = 12  # of a profile that are shown


def bench_table(found: Bench) -> RenderableType:
    """One table for each phase, the profile if there is one, and what it was measured on."""
    machine = found.machine
    rates = f"{as_bytes(machine['bandwidth'])}/s, {machine['flops'] / 1e9:,.1f} GFLOP/s"
    how = f", {' and '.join(machine['measured'])} measured in this run" if machine["measured"] else ""
    paths = dict.fromkeys(f"{row.model}, {row.phase}: {row.path}" for row in found.rows)
    lines = [
        f"{machine['name']} ({machine['device']}), {machine['threads']} threads; ceiling: {rates}{how}",
        f"prompt {found.prompt}, {found.generate} steps; medians of {found.repeats} repeats, in turns; seed "
        f"{found.seed}",
        *paths,
        *(f"{one['model']}, batch {one['batch']}: {one['error']}" for one in found.failed),
    ]
    phases = [_phase(found, phase) for phase in dict.fromkeys(row.phase for row in found.rows)]
    return Group(*phases, *_profile(found), *map(Text, lines))


def _phase(found: Bench, phase: str) -> Table:
    """Speed-ups are over the first model of the run."""
    table = Table(title=phase, title_justify="left")
    for header in ("batch", "model", "ms", "tokens/s", "speed-up", "ceiling", "reached", "peak", "state"):
        table.add_column(header, justify="left" if header == "model" else "right")
    first: dict[int, str] = {}
    for row in found.rows:
        if row.phase != phase:
            continue
        base = first.setdefault(row.batch, row.model)
        ms, low, high = row.ms
        table.add_row(
            f"{row.batch:,}",
            escape(row.model),
            f"{ms:,.2f} ({low:,.2f} to {high:,.2f})",
            f"{row.tokens_per_second.value:,.0f}",
            f"{row.speedup(found.row(base, row.batch, phase))[0]:.2f}x",
            f"{row.ceiling:,.0f}",
            f"{100 * row.fraction:.0f} %",
            "" if row.peak_bytes is None else as_bytes(row.peak_bytes),
            as_bytes(row.state_bytes),
        )
    return table


def _profile(found: Bench) -> list[RenderableType]:
    """Operations by the time that the first model spends in them, all models side by side."""
    if not found.profile:
        return []
    table = Table(title="one decode step, largest batch: ms (calls) by operation", title_justify="left")
    table.add_column("operation")
    for label in found.profile:
        table.add_column(escape(label), justify="right")
    spent = {label: {row["operation"]: row for row in rows} for label, rows in found.profile.items()}
    names = dict.fromkeys(row["operation"] for rows in found.profile.values() for row in rows[:OPERATIONS])
    for name in sorted(names, key=lambda n: -max(rows[n]["ms"] if n in rows else 0 for rows in spent.values())):
        cells = [f"{rows[name]['ms']:.2f} ({rows[name]['calls']:g})" if name in rows else "" for rows in spent.values()]
        table.add_row(escape(name), *cells)
    table.add_row("all", *(f"{sum(row['ms'] for row in rows.values()):.2f}" for rows in spent.values()))
    return [table]
