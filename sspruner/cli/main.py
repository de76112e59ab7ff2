"""The `sspruner` command: registers one file per command. Heavy imports happen inside the commands."""

from __future__ import annotations

import typer

from sspruner.cli import apply, inspect, plan, prune, score, scorers

app = typer.Typer(
    name="sspruner",
    help="Structured pruning of state-space language models: score, plan, cut, prove, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for module in (prune, score, plan, apply, inspect, scorers):
    app.command(module.NAME)(module.command)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
