"""`sspruner export`: write a model for readers that have no sspruner."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sspruner.cli import options as o
from sspruner.cli.console import prepare, reports_errors

NAME = "export"


@reports_errors
def command(
    out: Annotated[Path, typer.Option(help="Folder to write the model to.")],
    model: o.Model = None,
    to: Annotated[str, typer.Option(help="hf-remote: for transformers with trust_remote_code.")] = "hf-remote",
    dtype: o.Dtype = "auto",
    plugin: o.Plugin = None,
    overwrite: o.Overwrite = False,
) -> None:
    """Write a cut model so that it loads without sspruner."""
    import sspruner
    from sspruner.io.output import check_output

    check_output(out, overwrite)
    prepare(plugin)
    loaded, tokenizer = sspruner.load(model, dtype=dtype)
    sspruner.export(loaded, out, tokenizer, to=to, overwrite=overwrite)
    typer.echo(f"exported to {out}: AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True)")
