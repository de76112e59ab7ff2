"""`sspruner scorers`: what is installed, and where it comes from."""

from __future__ import annotations

from sspruner.cli import options as o
from sspruner.cli.console import prepare, reports_errors, show

NAME = "scorers"


@reports_errors
def command(plugin: o.Plugin = None) -> None:
    """List the installed scorers: axes, needs, origin."""
    from rich.table import Table

    from sspruner.scoring.known import installed_scorers

    prepare(plugin)
    table = Table("scorer", "axes", "needs")
    table.add_column("plugin", overflow="fold")  # a path is of use only whole
    for name, (cls, origin) in sorted(installed_scorers().items()):
        table.add_row(name, ", ".join(sorted(cls.axes)), cls.needs, origin)
    show(table)
