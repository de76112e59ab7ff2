"""How the help is shown: one panel for each group of options, the value and the default of each."""

from __future__ import annotations

import inspect
from typing import Any

from cyclopts import Parameter
from cyclopts.help import DefaultFormatter


def shown_default(value: Any) -> str | None:
    """The default of an option as the help shows it; None where there is nothing to show: off, or empty."""
    return None if value is None or value is False or value in ((), {}, []) else str(value)


#: Of every option: no --no-..., and of an option that is given twice the last counts.
OPTION = Parameter(negative=(), allow_repeating=True, show_default=shown_default)


#: What readers look for first goes first in its panel; the rest as it is defined.
FIRST = ("--sparsity", "--keep", "--scorer", "--basis")


def examples(command: Any) -> str:
    """The examples in a command's docstring, for the end of its help."""
    lines = (inspect.getdoc(command) or "").partition("Examples:\n")[2].splitlines()
    return "\n".join(["Examples:", *(f"  {line.strip()}" for line in lines if line.strip())])


class HelpFormatter(DefaultFormatter):
    """Panels whose texts are filled to the width of the terminal, however they are wrapped in the source."""

    def __call__(self, console: Any, options: Any, panel: Any) -> None:
        """Render one panel."""
        from rich.text import Text

        panel.entries.sort(key=lambda entry: next((FIRST.index(n) for n in entry.names if n in FIRST), len(FIRST)))
        for entry in panel.entries:
            if isinstance(words := getattr(entry.description, "primary_renderable", None), Text):
                entry.description.primary_renderable = Text(" ".join(words.plain.split()))
        super().__call__(console, options, panel)
