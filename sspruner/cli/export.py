"""`sspruner export`: write a model for other readers than sspruner."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from sspruner.cli import options as o
from sspruner.cli.console import prepare, reports_errors

NAME = "export"


@reports_errors
def command(
    out: Annotated[Path, typer.Option(help="Folder to write the model to.")],
    model: o.Model = None,
    to: Annotated[
        Optional[str],
        typer.Option(
            help="hf: stock transformers. hf-padded: stock, different sizes padded with zeros. hf-remote: transformers "
            "with trust_remote_code. mamba-ssm: its own loader. sspruner: sspruner.load.",
            show_default="hf, or what --target reads",
        ),
    ] = None,
    target: o.Target = None,
    tp: o.Tp = 1,
    dtype: o.Dtype = "auto",
    tokenizer: o.Tokenizer = None,
    trust_remote_code: o.TrustRemoteCode = False,
    plugin: o.Plugin = None,
    overwrite: o.Overwrite = False,
) -> None:
    """Write a cut model for another reader, or say why that cannot take it."""
    import sspruner
    from sspruner.files.output import check_output
    from sspruner.formats.stock import padding
    from sspruner.io.export import reads, writer_of
    from sspruner.io.skeleton import skeleton
    from sspruner.reporting.card import report_beside

    writer = writer_of(to, target, tp)
    check_output(out, overwrite)
    prepare(plugin)
    loaded, tokenizer = sspruner.load(model, tokenizer=tokenizer, dtype=dtype, trust_remote_code=trust_remote_code)
    report = report_beside(loaded, model) if model else None
    sspruner.export(loaded, out, tokenizer, to=to, target=target, tp=tp, report=report, overwrite=overwrite)
    typer.echo(f"exported to {out}: {reads(writer, out)}")
    if writer == "hf-padded":
        typer.echo(padding(loaded, skeleton(out)))
