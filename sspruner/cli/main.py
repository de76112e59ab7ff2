"""The `sspruner` command: registers one file per command. Heavy imports happen inside the commands."""

from __future__ import annotations

import sys

import typer

from sspruner.cli import (
    apply,
    bench,
    compare,
    doctor,
    evaluate,
    export,
    inspect,
    plan,
    prune,
    report,
    score,
    scorers,
    train,
)
from sspruner.cli.console import fail

app = typer.Typer(
    name="sspruner",
    help="Structured pruning of state-space language models: score, plan, cut, prove, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for module in (prune, score, plan, apply, compare, evaluate, bench, report, export, inspect, scorers, doctor):
    app.command(module.NAME)(module.command)
app.add_typer(train.app)


def main() -> None:
    """Entry point of the console script. Wrong usage is reported like any other error: one line, exit code 2."""
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        # Usage errors are click's, and typer carries its own copy of click: known by what they can do.
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        hint = f" (see `{context.command_path} --help`)" if context else ""
        line = f"sspruner: {' '.join(error.format_message().split())}{hint}"
        code = fail(error.exit_code, line)  # type: ignore[attr-defined]
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
