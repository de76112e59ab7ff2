"""`sspruner report`: the results in a folder as one HTML file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

from sspruner.cli.console import reports_errors, say
from sspruner.cli.machine import OUTPUT

NAME = "report"
RESULTS = Group("Results", sort_key=0)


@Parameter(name="*", group=OUTPUT)
@dataclass(frozen=True)
class Page:
    """The file that is written."""

    out: Annotated[Path | None, Parameter(metavar="FILE", show_default="report.html in the folder")] = None
    """HTML file to write."""


@reports_errors
def command(
    folder: Annotated[
        Path, Parameter(name="DIR", group=RESULTS, help="What compare --out or prune --out wrote, or JSON results.")
    ],
    /,
    *,
    page: Page = Page(),
) -> None:
    """Show the results in a folder as one HTML file, which needs no network, with PNG files beside it.

    Examples:
        sspruner report smaller
        sspruner report results --out results.html
    """
    import sspruner

    say(f"written to {sspruner.report(folder, page.out)}")
