"""`--recipe FILE`: fill options without a flag from a recipe file."""

from __future__ import annotations

from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from cyclopts import Token

#: Fields that set the amount to remove. A flag of one set replaces those from the file.
_FRACTIONS = {"sparsity", "keep", "pattern"}
_LIMITS = {"state_bytes", "max_batch", "memory", "state_memory", "parameters", "perplexity_increase", "kl"}


def fill_from_recipe(app: Any, commands: tuple[str, ...], arguments: Any) -> None:
    """Give every option without a flag its value from the recipe file. Raises InputError for an invalid file.

    A flag for the amount replaces all of the file's: `--keep 64` replaces its sparsity and its limits.
    """
    files = [argument.tokens[-1].value for argument in arguments if argument.name == "--recipe" and argument.tokens]
    for parameter in arguments if files else ():
        if not parameter.keys and is_recipe(parameter.hint):
            recipe = parameter.hint.load(Path(files[0]))
            _fill(recipe, [leaf for leaf in parameter.children_recursive if not leaf.children], files[0])


def is_recipe(kind: Any) -> bool:
    """Check whether a parameter of a command is a recipe: a dataclass with `load` and `save`."""
    return is_dataclass(kind) and hasattr(kind, "load") and hasattr(kind, "save")


def _fill(recipe: Any, leaves: list[Any], source: str) -> None:
    flags = {leaf.field_info.name for leaf in leaves if leaf.tokens}
    replaced = (
        flags | (_FRACTIONS | _LIMITS if flags & _FRACTIONS else set()) | (_FRACTIONS if flags & _LIMITS else set())
    )
    for leaf in leaves:
        value = recipe
        for key in leaf.keys:
            value = getattr(value, key)
        if leaf.field_info.name not in replaced and value is not None:
            leaf.append(Token(keyword=leaf.name, implicit_value=value, source=source))
