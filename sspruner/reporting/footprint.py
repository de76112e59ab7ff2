"""Tables of a footprint: the memory of a model, and the bytes moved in a decode step, without and with a plan."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sspruner.benchmarking.footprint import Footprint
from sspruner.units import as_bytes


def footprint_table(
    dense: Footprint,
    cut: Footprint | None,
    *,
    batches: Sequence[int],
    memory: float | None,
    bandwidth: float | None,
    assumed: bool,
) -> RenderableType:
    """Return two tables. cut: the footprint with a plan. memory: bytes; bandwidth: bytes per second.

    assumed: True if the config names no dtype.
    """
    source = "assumed, for config.json names no dtype" if assumed else "as config.json says"
    return Group(
        _sizes(dense, cut, memory),
        Text(f"weights in {dense.dtype}, {source}"),
        _decode(dense, cut, batches, bandwidth),
        Text("the least that a step can move: weights, states and KV cache; no activations"),
    )


def _sizes(dense: Footprint, cut: Footprint | None, memory: float | None) -> Table:
    table = Table(title="memory", title_justify="left")
    table.add_column("")
    for header in ("model", *(("with the plan", "ratio") if cut else ())):
        table.add_column(header, justify="right")
    both = [dense, *([cut] if cut else [])]
    rows: list[tuple[str, list[int], bool]] = [
        ("parameters", [f.parameters for f in both], False),
        ("weights", [f.weight_bytes for f in both], True),
        (f"recurrent state per sequence ({dense.state_dtype})", [f.state_bytes for f in both], True),
        ("convolution state per sequence", [f.conv_bytes for f in both], True),
        (f"KV cache per sequence, {dense.context:,} tokens", [f.kv_bytes for f in both], True),
        ("all per sequence", [f.sequence_bytes for f in both], True),
    ]
    if memory is not None:
        rows.append((f"sequences that fit in {as_bytes(memory)}", [f.sequences(memory) for f in both], False))
    for label, values, size in rows:
        shown = [as_bytes(v) if size else f"{v:,}" for v in values]
        table.add_row(label, *shown, *([_ratio(values[1], values[0])] if cut else []))
    return table


def _decode(dense: Footprint, cut: Footprint | None, batches: Sequence[int], bandwidth: float | None) -> Table:
    at = "" if bandwidth is None else f" at {as_bytes(bandwidth)}/s"
    table = Table(title=f"decode, bytes moved{at}", title_justify="left")
    for name in ("", *(("with the plan: ",) if cut else ())):
        for header in ("batch", "per step", "per token", *(("tokens/s at most",) if bandwidth else ())):
            if not (name and header == "batch"):
                table.add_column(name + header, justify="right")
    if cut:
        table.add_column("speed-up at most", justify="right")
    for batch in batches:
        row = [f"{batch:,}"]
        for footprint in (dense, *([cut] if cut else [])):
            step = footprint.step_bytes(batch)
            row += [as_bytes(step), as_bytes(step / batch)]
            row += [f"{footprint.ceiling(batch, bandwidth):,.0f}"] if bandwidth else []
        table.add_row(*row, *([_ratio(dense.step_bytes(batch), cut.step_bytes(batch))] if cut else []))
    return table


def _ratio(one: float, other: float) -> str:
    return f"{one / other:.3f}x" if other else ""
