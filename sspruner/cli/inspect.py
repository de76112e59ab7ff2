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
    target: o.Target = None,
    tp: o.Tp = 1,
    trust_remote_code: o.TrustRemoteCode = False,
    plot: Annotated[
        bool, typer.Option("--plot", help="Draw each layer's size, and its scores where the folder has some.")
    ] = False,
    plugin: o.Plugin = None,
    json: o.Json = None,
) -> None:
    """Show a model's graph and what it takes, from its config alone: axes, bytes, sequences that fit, targets."""
    import sspruner
    from sspruner.benchmarking.footprint import footprint
    from sspruner.files.strict_json import dumps
    from sspruner.formats.fitting import after, offers
    from sspruner.formats.targets import chosen
    from sspruner.io.skeleton import skeleton
    from sspruner.plans.plan import check_plan
    from sspruner.reporting.footprint import footprint_table
    from sspruner.reporting.targets import targets_table
    from sspruner.reporting.terminal import plots
    from sspruner.surgery.apply import apply_sizes
    from sspruner.units import parse_bandwidth, parse_bytes

    check_json(json)
    wanted = chosen(target, tp)
    batches = batches_from(batch)
    room = None if memory is None else parse_bytes(memory, "--memory")
    rate = None if bandwidth is None else parse_bandwidth(bandwidth, "--bandwidth")
    made = None if plan is None else sspruner.Plan.load(plan)
    prepare(plugin)
    loaded = skeleton(model, trust_remote_code=trust_remote_code)
    graph = sspruner.trace(loaded)
    found = footprint(loaded, graph, context)
    if made is not None:
        check_plan(made, graph, model=loaded)
    taken = offers(loaded if made is None else after(loaded, made, graph), wanted)
    cut = None if made is None else footprint(loaded, apply_sizes(loaded, made), context)
    data = graph.to_json() | {"footprint": found.to_json(batches, room, rate)}
    if cut is not None:
        data["with_plan"] = cut.to_json(batches, room, rate)
    data["targets"] = {offer.target.name: offer.to_json() for offer in taken}
    pictures = plots(loaded, model, made) if plot else []
    emit(dumps(data, indent=2), json)
    if str(json) != "-":
        show(graph.tree())
        assumed = loaded.config.dtype is None
        show(footprint_table(found, cut, batches=batches, memory=room, bandwidth=rate, assumed=assumed))
        show(targets_table(taken, with_plan=made is not None))
        for picture in pictures:
            show(picture)
