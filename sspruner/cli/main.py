"""The `sspruner` command: registers one file per command. Heavy imports happen inside the commands."""

from __future__ import annotations

import os
import sys

from cyclopts import App, CycloptsError

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
from sspruner.cli.console import fail, known_error
from sspruner.cli.help import OPTION, HelpFormatter, examples
from sspruner.cli.recipe_file import fill_from_recipe
from sspruner.cli.usage import usage

COMMANDS = (prune, score, plan, apply, compare, evaluate, bench, report, export, inspect, scorers, doctor)


def version() -> str:
    """The version of this package."""
    import sspruner

    return f"sspruner {sspruner.__version__}"


app = App(
    name="sspruner",
    help="Structured pruning of state-space language models: score, plan, cut, prove, measure.",
    version=version,
    config=fill_from_recipe,
    default_parameter=OPTION,
    help_format="plaintext",
    help_formatter=HelpFormatter(),
    suppress_keyboard_interrupt=False,
)
for place, module in enumerate(COMMANDS):
    app.command(module.command, name=module.NAME, sort_key=place, help_epilogue=examples(module.command))
app.command(train.app)


def main() -> None:
    """Entry point of the console script. Wrong usage is reported like any other error: one line, exit code 2."""
    try:
        code = app(sys.argv[1:], exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        code = fail(2, usage(error, app))
    except BrokenPipeError:  # the reader of our output is gone, as `head` goes: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (Exception, KeyboardInterrupt) as error:  # before the command began: a recipe, a text of an option
        known = known_error(error)
        if known is None:
            raise
        code = fail(*known)
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
