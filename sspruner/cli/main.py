"""The `sspruner` command: registers one file per command. Heavy imports happen inside the commands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from sspruner.cli import apply, inspect, plan, prune, score, scorers

UsageError: Any = typer.BadParameter.__mro__[1]  # click's; recent typer carries its own copy of click


@contextmanager
def _one_line() -> Iterator[None]:
    """Report wrong usage like any other error: one line on standard error, exit code 2."""
    try:
        yield
    except UsageError as error:
        hint = f" (see `{error.ctx.command_path} --help`)" if error.ctx else ""
        typer.echo(f"sspruner: {' '.join(error.format_message().split())}{hint}", err=True)
        raise typer.Exit(2) from None


class _Commands(TyperGroup):
    """A wrong option, value or command is reported in one line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args:  # shows the help
            return super().parse_args(ctx, args)
        with _one_line():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with _one_line():
            return super().invoke(ctx)


app = typer.Typer(
    name="sspruner",
    cls=_Commands,
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
