"""`sspruner apply`: cut a model as a plan says, prove it, save it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sspruner.cli import options as o
from sspruner.cli.console import prepare, reports_errors

NAME = "apply"


@reports_errors
def command(
    out: Annotated[Path, typer.Option(help="Folder to write the model to.")],
    model: o.Model = None,
    plan: Annotated[Path, typer.Option(help="What `sspruner plan` wrote.")] = Path("plan.json"),
    mode: o.Mode = "slice",
    dtype: o.Dtype = "auto",
    tokenizer: o.Tokenizer = None,
    trust_remote_code: o.TrustRemoteCode = False,
    plugin: o.Plugin = None,
    overwrite: o.Overwrite = False,
) -> None:
    """Cut a model as a plan says, prove the cut, and save the result."""
    import sspruner
    from sspruner.files.output import check_output

    check_output(out, overwrite)
    made = sspruner.Plan.load(plan)
    prepare(plugin)
    loaded, tokenizer = sspruner.load(model, tokenizer=tokenizer, dtype=dtype, trust_remote_code=trust_remote_code)
    sspruner.apply(loaded, made, mode=mode)
    sspruner.save(loaded, out, tokenizer, overwrite=overwrite)
    typer.echo(f"{made}\napplied ({mode}), saved to {out}")
