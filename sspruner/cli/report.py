"""`sspruner report`: write the results in a folder as one HTML file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

from sspruner.cli.console import reports_errors, say
from sspruner.cli.help import command_app
from sspruner.cli.machine import OUTPUT

NAME = "report"
RESULTS = Group("Results", sort_key=0)


@Parameter(name="*", group=OUTPUT)
@dataclass(frozen=True)
class Page:
    """The file to write."""

    out: Annotated[Path | None, Parameter(metavar="FILE", show_default="report.html in the folder")] = None
    """HTML file to write."""


@reports_errors
def command(
    folder: Annotated[
        Path,
        Parameter(name="DIR", group=RESULTS, help="Folder from compare --out or prune --out, or with JSON results."),
    ],
    /,
    *,
    page: Page = Page(),
) -> None:
    """Run `sspruner report`.

    Examples:
        sspruner report smaller
        sspruner report results --out results.html
    """
    import sspruner

    say(f"written to {sspruner.report(folder, page.out)}")


app = command_app(NAME, command)
