"""Generate the tables of options in docs/cli.md, and the frozen list of flags, from the command line itself.

`python tests/support/cli_reference.py` writes both; run it after a change of options or of their help.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cyclopts import App

from sspruner.cli.help import FIRST, OPTION, shown_default
from sspruner.cli.main import app

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "cli.md"
FLAGS = ROOT / "tests" / "cli" / "flags.txt"

#: Where an option is explained.
LINKS = {
    "--scorer": "scorers.md",
    "--basis": "balanced.md",
    "--plugin": "plugins.md",
    "--axis": "graph.md#axes",
    "--pattern": "graph.md#single-elements",
    "--ratio": "plan-and-surgery.md#several-axes-in-one-plan",
    "--state-bytes": "budgets.md",
    "--max-ppl-increase": "budgets.md",
    "--allocation": "allocation.md",
    "--curves": "allocation.md#the-best-split",
    "--refit": "refit.md",
    "--target": "targets.md",
    "--pool": "engine-memory.md",
    "--max-batch": "engine-memory.md#budgets",
    "--calibration": "calibration.md",
    "--no-cache": "calibration.md#cache",
    "--trust-remote-code": "saving.md#what-a-checkpoint-can-do-to-you",
    "--offload": "offload.md",
    "--device-map": "offload.md#several-devices",
    "--plot": "report.md#in-the-terminal",
    "--to": "export.md",
}


def commands(under: App = app, before: tuple[str, ...] = ()) -> Iterator[tuple[str, App]]:
    """Yield the words and the App of every command that runs something."""
    for name in under:
        if not name.startswith("-"):
            found = under[name]
            if found.default_command:
                yield " ".join((*before, name)), found
            yield from commands(found, (*before, name))


def arguments(command: App) -> list[Any]:
    """Return the options and arguments of a command, in the order of its help."""
    found = [
        a
        for a in command.assemble_argument_collection(default_parameter=OPTION, parse_docstring=True)
        if not a.children and a.show
    ]

    def place(argument: Any) -> tuple[Any, int]:
        (group,) = argument.parameter.group
        first = next((FIRST.index(name) for name in argument.names if name in FIRST), len(FIRST))
        return group.sort_key, first

    return sorted((a for a in found if not a.children and a.show), key=place)


def names(argument: Any) -> list[str]:
    """Return the flags of an option; none for a positional argument."""
    return [name for name in argument.names if name.startswith("-")]


def default(argument: Any) -> str:
    """Return the default of an option as the help shows it; "" for none."""
    shown = argument.parameter.show_default
    if isinstance(shown, str):
        return shown
    value = argument.field_info.default
    if argument.required or value is argument.field_info.empty:
        return ""
    return "off" if value is False else shown_default(value) or ""


def table(command: App) -> str:
    """Return the options of a command as a table in Markdown, with a bold row for each panel."""
    lines = ["| option | default | what |", "|---|---|---|"]
    panel = None
    for argument in arguments(command):
        (group,) = argument.parameter.group
        if group.name != panel:
            panel = group.name
            lines.append(f"| **{panel}** | | |")
        label = ", ".join(f"`{name}`" for name in names(argument)) or f"`{argument.name}`"
        link = next((LINKS[name] for name in names(argument) if name in LINKS), None)
        what = " ".join((argument.parameter.help or "").split()).replace("|", "\\|")
        more = f" [More]({link})." if link else ""
        lines.append(f"| {label} | {default(argument)} | {what}{more} |".replace("|  |", "| |"))
    return "\n".join(lines)


def with_tables(text: str) -> str:
    """Return the page with new tables between its markers `<!-- options of COMMAND -->` and `<!-- end -->`."""
    found = dict(commands())

    def made(match: re.Match[str]) -> str:
        if match[1] not in found:
            return match[0]
        return f"<!-- options of {match[1]} -->\n{table(found[match[1]])}\n<!-- end -->"

    return re.sub(r"<!-- options of ([\w ]+) -->\n.*?<!-- end -->", made, text, flags=re.DOTALL)


def flags() -> str:
    """Return every command with its arguments, flags and defaults, one per line."""
    lines = []
    for name, command in commands():
        lines.append(name)
        for argument in sorted(arguments(command), key=lambda argument: (bool(names(argument)), argument.name)):
            label = ", ".join(names(argument)) or argument.name
            flag = argument.field_info.default is False
            metavar = "" if flag or not names(argument) else f" {argument.parameter.metavar}"
            says = "required" if argument.required else default(argument)
            lines.append(f"  {label}{metavar}{f'  [{says}]' if says and not flag else ''}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FLAGS.write_text(flags(), encoding="utf-8")
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
