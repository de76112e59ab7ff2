"""Help texts: one panel for each group of options, with the value and the default of each."""

from __future__ import annotations

import inspect
from typing import Any

from cyclopts import App, Parameter
from cyclopts.help import DefaultFormatter


def shown_default(value: Any) -> str | None:
    """Return the default of an option for the help; None for off or empty."""
    return None if value is None or value is False or value in ((), {}, []) else str(value)


#: For every option: no --no-..., and the last of repeated values wins.
OPTION = Parameter(negative=(), allow_repeating=True, show_default=shown_default)


#: The most important options come first in their panel; the rest in the order of definition.
FIRST = ("--sparsity", "--keep", "--scorer", "--basis")


def examples(command: Any) -> str:
    """Return the examples in a command's docstring, for the end of its help."""
    lines = (inspect.getdoc(command) or "").partition("Examples:\n")[2].splitlines()
    return "\n".join(["Examples:", *(f"  {line.strip()}" for line in lines if line.strip())])


def command_app(name: str, command: Any) -> App:
    """Return the App of a command, with the examples in its docstring at the end of its help."""
    app = App(name=name, help_epilogue=examples(command))
    app.default(command)
    return app


class HelpFormatter(DefaultFormatter):
    """Formatter whose texts fill the width of the terminal, however they are wrapped in the source."""

    def __call__(self, console: Any, options: Any, panel: Any) -> None:
        """Render one panel."""
        from rich.text import Text

        panel.entries.sort(key=lambda entry: next((FIRST.index(n) for n in entry.names if n in FIRST), len(FIRST)))
        for entry in panel.entries:
            if isinstance(words := getattr(entry.description, "primary_renderable", None), Text):
                entry.description.primary_renderable = Text(" ".join(words.plain.split()))
        super().__call__(console, options, panel)
