"""`sspruner plan`: from scores and a budget to plan.json."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from sspruner.cli import options as o
from sspruner.cli.console import axes_from, bounds_from, prepare, ratios_from, reports_errors
from sspruner.errors import InputError

NAME = "plan"


@reports_errors
def command(
    model: o.Model = None,
    scores: Annotated[Path, typer.Option(help="What `sspruner score` wrote.")] = Path("scores.safetensors"),
    axis: Annotated[Optional[str], typer.Option(help="Fractions by axis: state=0.5,head=0.25.")] = None,
    sparsity: o.Sparsity = None,
    keep: o.Keep = None,
    allocation: o.Allocation = "uniform",
    multiple_of: o.MultipleOf = 1,
    ratio: o.Ratio = None,
    ignore: o.Ignore = None,
    pattern: o.Pattern = None,
    granularity: o.Granularity = None,
    rows: o.Rows = None,
    normalise: o.Normalise = None,
    floor: o.Floor = None,
    cap: o.Cap = None,
    curves: o.Curves = None,
    target: o.Target = None,
    tp: o.Tp = 1,
    dtype: o.Dtype = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    plugin: o.Plugin = None,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("plan.json"),
) -> None:
    """Decide what to keep: scores and a budget become plan.json."""
    import sspruner
    from sspruner.files.output import check_file
    from sspruner.formats.fitting import check_cut
    from sspruner.formats.targets import chosen
    from sspruner.plans.plan import check_plan

    fractions = axes_from(axis) if axis else None
    if isinstance(fractions, str):
        raise InputError(f"--axis {axis}: give a fraction for it, {axis}=0.5; the scores say which axes there are")
    if sparsity is None and keep is None and fractions is None and pattern is None:
        sparsity = 0.5
    if fractions is not None and (sparsity is not None or keep is not None):
        raise InputError("give fractions by axis or one sparsity or keep for all, not both")
    check_file(out)
    wanted = chosen(target, tp)
    prepare(plugin)
    loaded, _ = sspruner.load(model, dtype=dtype, trust_remote_code=trust_remote_code)
    graph = sspruner.trace(loaded)
    read = sspruner.Scores.load(scores)
    measured = sspruner.Sensitivity.load(curves) if curves else None
    if measured:
        measured.check(read)
    made = sspruner.plan(
        graph,
        read,
        sparsity=fractions if fractions is not None else sparsity,
        keep=keep,
        allocation=allocation,
        multiple_of=multiple_of,
        ratios=ratios_from(ratio),
        ignore=ignore or [],
        pattern=pattern,
        granularity=granularity,
        rows=rows or [],
        normalise=normalise,
        floor=bounds_from(floor, "--floor"),
        cap=bounds_from(cap, "--cap"),
        curves=measured.curves if measured else None,
        target=target,
        tp=tp,
    )
    check_plan(made, graph, sspruner.fingerprint(loaded))
    if wanted:
        check_cut(loaded, made, graph, wanted)
    made.save(out)
    if changes := read.metadata.get("changes_weights"):
        typer.echo(f"{changes} changes weights, too: only `sspruner prune` does that; this plan selects", err=True)
    for line in made.made_by["target"]["rounded"] if wanted else ():
        typer.echo(f"rounded for {wanted}: {line}")
    typer.echo(f"{made}\nin {out}")
