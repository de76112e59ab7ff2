"""`sspruner plan`: from scores and a budget to plan.json."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sspruner.cli import options as o
from sspruner.cli.console import prepare, reports_errors

NAME = "plan"


@reports_errors
def command(
    model: o.Model = None,
    scores: Annotated[Path, typer.Option(help="What `sspruner score` wrote.")] = Path("scores.safetensors"),
    sparsity: o.Sparsity = None,
    keep: o.Keep = None,
    allocation: o.Allocation = "uniform",
    multiple_of: o.MultipleOf = 1,
    dtype: o.Dtype = "auto",
    plugin: o.Plugin = None,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("plan.json"),
) -> None:
    """Decide what to keep: scores and a budget become plan.json."""
    import sspruner
    from sspruner.io.output import check_file
    from sspruner.planning.plan import check_plan

    if sparsity is None and keep is None:
        sparsity = 0.5
    check_file(out)
    prepare(plugin)
    loaded, _ = sspruner.load(model, dtype=dtype)
    graph = sspruner.trace(loaded)
    made = sspruner.plan(
        graph,
        sspruner.Scores.load(scores),
        sparsity=sparsity,
        keep=keep,
        allocation=allocation,
        multiple_of=multiple_of,
    )
    check_plan(made, graph, sspruner.fingerprint(loaded))
    made.save(out)
    typer.echo(f"{made}\nin {out}")
