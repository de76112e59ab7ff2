"""`sspruner report`: the results in a folder as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from sspruner.cli.console import reports_errors

NAME = "report"


@reports_errors
def command(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="What compare --out or prune --out wrote, or JSON results."),
    ],
    out: Annotated[
        Optional[Path], typer.Option(help="HTML file to write.", show_default="report.html in the folder")
    ] = None,
) -> None:
    """Show the results in a folder as one HTML file, which needs no network, with PNG files beside it."""
    import sspruner

    typer.echo(f"written to {sspruner.report(folder, out)}")
