"""Generate the tables of recipes in docs/recipes.md from the dataclasses themselves.

`python tests/support/recipe_reference.py` writes them; run it after a change of a field or of its help.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from sspruner.cli.help import OPTION
from sspruner.cli.recipe_file import is_recipe
from sspruner.recipes.common import parts
from support.cli_reference import commands, default, names

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


def recipes() -> dict[str, tuple[Any, list[Any]]]:
    """Return the recipe of each command by class name, with its fields as the command's options."""
    found = {}
    for _, command in commands():
        collected = command.assemble_argument_collection(default_parameter=OPTION, parse_docstring=True)
        for whole in collected:
            if not whole.keys and is_recipe(whole.hint):
                found[whole.hint.__name__] = whole.hint, [a for a in whole.children_recursive if not a.children]
    return found


def table(kind: Any, options: list[Any], only: str = "") -> str:
    """Return the keys of a recipe, or of one part of it, as a table in Markdown, with a bold row for each part."""
    lines = ["| key | default | option | what |", "|---|---|---|---|"]
    for key, part in parts(kind).items():
        if only not in ("", key):
            continue
        lines.append(f"| **`{key}`** | | | **{first_line(part)}** |")
        lines += [row(option) for option in options if option.keys[0] == key]
    return "\n".join(lines)


def row(option: Any) -> str:
    flags = ", ".join(f"`{name}`" for name in names(option))
    what = " ".join((option.parameter.help or "").split()).replace("|", "\\|")
    return f"| `{option.keys[1]}` | {default(option)} | {flags} | {what} |".replace("|  |", "| |")


def first_line(part: Any) -> str:
    return str(part.__doc__).strip().splitlines()[0]


def with_tables(text: str) -> str:
    """Return the page with new tables between its markers, `<!-- keys of CLASS[.PART] -->` and `<!-- end -->`."""
    found = recipes()

    def made(match: re.Match[str]) -> str:
        name, _, part = match[1].partition(".")
        return f"<!-- keys of {match[1]} -->\n{table(*found[name], part)}\n<!-- end -->"

    return re.sub(r"<!-- keys of ([\w.]+) -->\n.*?<!-- end -->", made, text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
