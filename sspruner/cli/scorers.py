"""`sspruner scorers`: what is installed, and where it comes from."""

from __future__ import annotations

from sspruner.cli.console import prepare, reports_errors, show
from sspruner.cli.machine import Plugins

NAME = "scorers"


@reports_errors
def command(*, plugins: Plugins = Plugins()) -> None:
    """List the installed scorers: axes, needs, origin.

    Examples:
        sspruner scorers
        sspruner scorers --plugin my_scorer.py
    """
    from rich.table import Table

    from sspruner.scoring.known import installed_scorers

    prepare(plugins.plugin)
    table = Table("scorer", "axes", "needs")
    table.add_column("plugin", overflow="fold")  # a path is of use only whole
    for name, (cls, origin) in sorted(installed_scorers().items()):
        table.add_row(name, ", ".join(sorted(cls.axes)), cls.needs, origin)
    show(table)
