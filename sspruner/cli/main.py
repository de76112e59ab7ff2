"""Entry point of `sspruner`: one module per command, which imports heavy libraries when it runs."""

from __future__ import annotations

import os
import sys

from cyclopts import App, CycloptsError

from sspruner.cli.console import fail, known_error
from sspruner.cli.help import OPTION, HelpFormatter
from sspruner.cli.recipe_file import fill_from_recipe
from sspruner.cli.usage import usage

#: Commands, in the order of the help, each in the module of its name, which is imported when it is needed.
COMMANDS = {
    "prune": "Score, plan and cut a model layer by layer; prove the cut; show the damage; save the result.",
    "score": "Score every unit of an axis on the dense model, and write scores.safetensors, or one file per scorer.",
    "plan": "Decide which units to keep: make plan.json from scores and a budget.",
    "apply": "Cut a model by a plan, prove the cut, and save the result.",
    "compare": "Score with several scorers in one pass, cut by each to several sizes, and show the damage of all cuts.",
    "evaluate": "Measure perplexity, recall and tasks, with intervals, alone or against the dense model; gates for CI.",
    "bench": "Measure prefill and decode of models, in turns, against the ceiling that this machine's rates allow.",
    "report": "Write the results in a folder as one HTML file, which needs no network, with PNG files beside it.",
    "export": "Write a pruned model for another library, or report why that library cannot load it.",
    "push": "Put the folder of a model on the Hugging Face hub.",
    "inspect": "Show a model's graph and its memory, from its config alone: axes, bytes, sequences that fit, targets.",
    "scorers": "List the installed scorers: axes, needs, origin.",
    "doctor": "Check the installation: versions, known hazards, and every family's code on a tiny random model.",
    "train": "Recover quality by distilling from the dense model, or prune during training. Start it with torchrun for "
    "several processes.",
}


def version() -> str:
    """Return the version of this package."""
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
for place, (name, summary) in enumerate(COMMANDS.items()):
    app.command(f"sspruner.cli.{name}:app", name=name, help=summary, sort_key=place)


def main() -> None:
    """Run the command line. Wrong usage is reported like any other error: one line, exit code 2."""
    try:
        code = app(sys.argv[1:], exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        code = fail(2, usage(error, app))
    except BrokenPipeError:  # the reader of our output has exited, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (Exception, KeyboardInterrupt) as error:  # before the command began: a recipe, an option's text
        known = known_error(error)
        if known is None:
            raise
        code = fail(*known)
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
