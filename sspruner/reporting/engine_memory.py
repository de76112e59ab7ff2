"""Tables of the memory of a model in an engine, before and after a cut."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sspruner.benchmarking.engine_memory import EngineMemory
from sspruner.units import as_bytes

#: Name of a size -> its row: what it says, and how it is written.
ROWS = {
    "state_dtype": ("dtype of the state", "text"),
    "kv_dtype": ("dtype of keys and values", "text"),
    "slot_bytes": ("one state slot, all layers", "exact"),
    "conv_bytes": ("of it convolution (R)", "bytes"),
    "state_bytes": ("of it recurrent (S)", "bytes"),
    "page_bytes": ("one layer's state", "exact"),
    "block_tokens": ("attention block, tokens", "count"),
    "padded_page_bytes": ("page of every layer", "exact"),
    "page_padding": ("padding of a state to a page", "percent"),
    "layers_per_group": ("layers in a group", "count"),
    "attention_groups": ("groups of attention layers", "count"),
    "recurrent_groups": ("groups of recurrent layers", "count"),
    "slots_per_sequence": ("state slots per sequence", "count"),
    "block_bytes": ("one block, a page of each layer of a group", "bytes"),
    "blocks": ("blocks in the pool", "count"),
    "slots": ("state slots in the pool", "count"),
    "kv_bytes_per_token": ("keys and values of one token", "bytes"),
    "tokens": ("tokens in the pool of keys and values", "count"),
}


def engine_table(found: EngineMemory) -> RenderableType:
    """Return the sizes of the caches, the sequences at each context, and what other blocks would give; then notes."""
    data = found.to_json()
    both = [data["model"], *([data["with_plan"]] if data["with_plan"] else [])]
    gpus = f" on each of {found.tp} GPUs" if found.tp > 1 else ""
    title = f"memory as {found.engine} counts it, {as_bytes(found.pool)} for caches{gpus}"
    parts = [_sizes(title, both), _contexts(both)]
    if data["model"].get("block_sizes"):
        parts.append(_blocks(both, found.contexts))
    return Group(*parts, *(Text(line) for line in data["notes"]))


def _sizes(title: str, both: list[dict[str, Any]]) -> Table:
    table = _table(title, len(both) > 1)
    for name, (label, kind) in ROWS.items():
        values = [one.get(name) for one in both]
        if any(value is not None for value in values):
            table.add_row(label, *_cells(values, kind))
    return table


def _contexts(both: list[dict[str, Any]]) -> Table:
    table = _table("sequences at once", len(both) > 1)
    for many in zip(*(one["contexts"] for one in both), strict=True):
        at = f"{many[0]['context']:,} tokens: "
        table.add_row(f"{at}sequences", *_cells([one["sequences"] for one in many], "count"))
        table.add_row("  memory of one", *_cells([one["bytes_per_sequence"] for one in many], "bytes"))
        if "concurrency" in many[0]:
            table.add_row("  maximum concurrency, as logged", *_cells([one["concurrency"] for one in many], "times"))
            table.add_row("  of it padding and unused tokens", *_cells([one["wasted"] for one in many], "percent"))
        if many[0].get("balanced_ratio") is not None:
            ratios = [one["balanced_ratio"] for one in many]
            table.add_row("  balanced --mamba-full-memory-ratio", *_cells(ratios, "ratio"))
    return table


def _blocks(both: list[dict[str, Any]], contexts: tuple[int, ...]) -> Table:
    """Return a row for each --block-size: the attention block it makes, its padding, and the sequences."""
    title = "with another --block-size" + (": before and after the plan" if len(both) > 1 else "")
    table = Table(title=title, title_justify="left")
    for header in ("--block-size", "block, tokens", "padding", *(f"sequences at {c:,}" for c in contexts)):
        table.add_column(header, justify="right")
    for rows in zip(*(one["block_sizes"] for one in both), strict=True):
        pairs = [[f"{row['block_tokens']:,}" for row in rows], [f"{row['page_padding']:.1%}" for row in rows]]
        pairs += [[f"{row['sequences'][i]:,}" for row in rows] for i in range(len(contexts))]
        table.add_row(f"{rows[0]['block_size']}", *(" → ".join(pair) for pair in pairs))
    return table


def _table(title: str, has_cut: bool) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for header in ("model", *(("with the plan", "ratio") if has_cut else ())):
        table.add_column(header, justify="right")
    return table


def _cells(values: list[Any], kind: str) -> list[str]:
    cells = [_text(value, kind) for value in values]
    if len(values) == 1:
        return cells
    before, after = values
    counted = kind not in ("text", "percent") and before and after is not None
    return [*cells, f"{after / before:.3f}x" if counted else ""]


def _text(value: Any, kind: str) -> str:
    if value is None:
        return "–"
    match kind:
        case "bytes":
            return as_bytes(value)
        case "exact":
            return f"{value:,} B"
        case "count":
            return f"{value:,}"
        case "times":
            return f"{value:,.2f}x"
        case "ratio":
            return f"{value:.3g}"
        case "percent":
            return f"{value:.1%}"
    return str(value)
