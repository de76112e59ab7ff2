"""`sspruner scorers`: list the installed scorers and their plugins."""

from __future__ import annotations

from sspruner.cli.console import prepare, reports_errors, show
from sspruner.cli.help import command_app
from sspruner.cli.machine import Plugins

NAME = "scorers"


@reports_errors
def command(*, plugins: Plugins = Plugins()) -> None:
    """Run `sspruner scorers`.

    Examples:
        sspruner scorers
        sspruner scorers --plugin my_scorer.py
    """
    from rich.table import Table

    from sspruner.scoring.known import installed_scorers

    prepare(plugins.plugin)
    table = Table("scorer", "axes", "needs")
    table.add_column("plugin", overflow="fold")  # never truncate a path
    for name, (cls, origin) in sorted(installed_scorers().items()):
        table.add_row(name, ", ".join(sorted(cls.axes)), cls.needs, origin)
    show(table)


app = command_app(NAME, command)
