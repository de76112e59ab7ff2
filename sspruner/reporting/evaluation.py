"""Tables of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sspruner.evaluation.paired import FEW, Interval
from sspruner.evaluation.result import Evaluation, Row
from sspruner.units import change_text, interval_text, stacked

STATES = ("stored", "fp32 state")  # the columns of a model with stored states
SHARES = ("accuracy", "agreement", "/acc", "/exact_match")  # parts of the names of metrics shown in per cent


def evaluation_table(evaluation: Evaluation) -> RenderableType:
    """Return a row for each metric, then perplexity by position and by length, the protocol and the notes."""
    title = escape(evaluation.model) + (
        f" against {escape(evaluation.against)}" if evaluation.against is not None else ""
    )
    parts: list[RenderableType] = []
    p = evaluation.protocol
    if evaluation.by_state:
        state = p["state"]
        parts.append(_table(f"{title}: recurrent state in {stored_as(state)}", "metric", evaluation.by_state, STATES))
    if evaluation.rows:
        chance = {"recall_accuracy": 1 / p["recall"]["pairs"]} if p.get("recall") else {}
        rows = {row.metric: row for row in evaluation.rows}
        parts.append(_table(f"{title}: 95 % intervals", "metric", rows, chance=chance))
    if evaluation.by_position:
        parts.append(_table("perplexity by position: tokens read before", "tokens", evaluation.by_position))
    if evaluation.by_length:
        parts.append(_table("perplexity by length of the window", "tokens", evaluation.by_length))
    every = (
        *evaluation.by_state.values(),
        *evaluation.rows,
        *evaluation.by_position.values(),
        *evaluation.by_length.values(),
    )
    if any(row.items < FEW for row in every):
        parts.append(
            Text(f"fewer than {FEW} items are too few for a 95 % interval, and one has none: measure more tokens")
        )
    source = {"dense": "sampled from the dense model", "model": "sampled from the model"}.get(p["text_from"], p["text"])
    lines = [
        f"text: {source}; windows of {p['window']} tokens, stride {p['stride']}: every token but the first of a text "
        f"counts once; {p['dtype']}, seed {p['seed']}",
        *evaluation.notes,
    ]
    return Group(*parts, *[Text(line) for line in lines])


def stored_as(state: Mapping[str, Any]) -> str:
    """Return how the recurrent states of one sequence are stored, and their bytes."""
    every = "after every token" if state["every"] == 1 else f"every {state['every']} tokens"
    rounding = {"nearest": "rounded to the nearest", "stochastic": "rounded stochastically"}
    how = rounding.get(state["rounding"], "rounded with error feedback")
    return f"{state['dtype']}, {how} {every}: {state['bytes']:,} bytes a sequence instead of {state['fp32_bytes']:,}"


def _table(
    title: str,
    head: str,
    rows: Mapping[str, Row],
    models: tuple[str, str] = ("model", "against"),
    chance: Mapping[str, float] = MappingProxyType({}),
) -> Table:
    """Return a table of rows. chance: metric -> what a guess among the values that were read would reach."""
    compared = any(row.against is not None for row in rows.values())
    table = Table(title=title, title_justify="left")
    table.add_column(head)
    for header in (models[0], *((models[1], "change") if compared else ()), "items"):
        table.add_column(header, justify="right")
    for name, row in rows.items():
        share = any(part in name for part in SHARES)
        cells = [_shown(row.value, share, chance.get(name))]
        if compared:
            cells += [_shown(row.against, share, chance.get(name)), _change(row, share)]
        table.add_row(escape(name), *map(stacked, cells), str(row.items))
    return table


def _shown(interval: Interval | None, share: bool, chance: float | None = None) -> str:
    if interval is None:
        return ""
    if chance is not None and interval.low <= chance:
        return f"{_shown(interval, share)}, at chance"
    return interval_text([100 * x for x in interval], unit=" %") if share else interval_text(interval)


def _change(row: Row, share: bool) -> str:
    if row.change is None:
        return ""
    if row.kind == "ratio":
        return change_text(row.change)
    scale, unit = (100, " points") if share else (1, "")
    return interval_text([scale * x for x in row.change], unit=unit, sign="+")
