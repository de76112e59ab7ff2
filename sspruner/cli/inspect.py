"""`sspruner inspect`: what can be removed from a model, and what it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from sspruner.cli import options as o
from sspruner.cli.console import batches_from, check_json, emit, prepare, reports_errors, show

NAME = "inspect"


@reports_errors
def command(
    model: o.Model = None,
    plan: Annotated[
        Optional[Path], typer.Option(help="What `sspruner plan` wrote: show what it leaves, beside the model.")
    ] = None,
    memory: Annotated[
        Optional[str], typer.Option(help="Show how many sequences fit beside the weights, e.g. 24GB.")
    ] = None,
    context: Annotated[int, typer.Option(min=0, help="Tokens of a sequence, for the KV cache of hybrids.")] = 4096,
    batch: Annotated[str, typer.Option(help="Batches whose decode steps are shown.")] = "1,16,64,256",
    bandwidth: Annotated[
        Optional[str], typer.Option(help="Show tokens per second at most with this memory bandwidth, e.g. 3.35TB/s.")
    ] = None,
    trust_remote_code: o.TrustRemoteCode = False,
    plugin: o.Plugin = None,
    json: o.Json = None,
) -> None:
    """Show a model's graph and what it takes, from its config alone: axes, sizes, bytes, sequences that fit, decode."""
    from json import dumps

    import sspruner
    from sspruner.footprint import footprint
    from sspruner.io.skeleton import skeleton
    from sspruner.limits import parse_bandwidth, parse_bytes
    from sspruner.report.footprint import footprint_table
    from sspruner.surgery.apply import apply_sizes

    check_json(json)
    batches = batches_from(batch)
    room = None if memory is None else parse_bytes(memory, "--memory")
    rate = None if bandwidth is None else parse_bandwidth(bandwidth, "--bandwidth")
    made = None if plan is None else sspruner.Plan.load(plan)
    prepare(plugin)
    loaded = skeleton(model, trust_remote_code=trust_remote_code)
    graph = sspruner.trace(loaded)
    found = footprint(loaded, graph, context)
    cut = None if made is None else footprint(loaded, apply_sizes(loaded, made), context)
    data = graph.to_json() | {"footprint": found.to_json(batches, room, rate)}
    if cut is not None:
        data["with_plan"] = cut.to_json(batches, room, rate)
    emit(dumps(data, indent=2), json)
    if str(json) != "-":
        show(graph.tree())
        assumed = loaded.config.dtype is None
        show(footprint_table(found, cut, batches=batches, memory=room, bandwidth=rate, assumed=assumed))
