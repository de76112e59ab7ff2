"""`--recipe FILE`: the values of a recipe file take the place of flags that are not given."""

from __future__ import annotations

from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from cyclopts import Token

#: Ways to say how much is removed. A flag of one set takes the place of those that the file gives.
_FRACTIONS = {"sparsity", "keep", "pattern"}
_LIMITS = {"state_bytes", "max_batch", "memory", "parameters", "perplexity_increase", "kl"}


def fill_from_recipe(app: Any, commands: tuple[str, ...], arguments: Any) -> None:
    """Give every option without a flag the value that the recipe file has. Raises InputError for a bad file.

    A flag that says how much takes the place of all that the file says about it: `--keep 64` that of its sparsity and
    its limits.
    """
    given = [argument.tokens[-1].value for argument in arguments if argument.name == "--recipe" and argument.tokens]
    for whole in arguments if given else ():
        if not whole.keys and is_recipe(whole.hint):
            recipe = whole.hint.load(Path(given[0]))
            _fill(recipe, [leaf for leaf in whole.children_recursive if not leaf.children], given[0])


def is_recipe(kind: Any) -> bool:
    """Whether a parameter of a command is a recipe: a dataclass that is read from a file and written to one."""
    return is_dataclass(kind) and hasattr(kind, "load") and hasattr(kind, "save")


def _fill(recipe: Any, leaves: list[Any], source: str) -> None:
    given = {leaf.field_info.name for leaf in leaves if leaf.tokens}
    replaced = (
        given | (_FRACTIONS | _LIMITS if given & _FRACTIONS else set()) | (_FRACTIONS if given & _LIMITS else set())
    )
    for leaf in leaves:
        value = recipe
        for key in leaf.keys:
            value = getattr(value, key)
        if leaf.field_info.name not in replaced and value is not None:
            leaf.append(Token(keyword=leaf.name, implicit_value=value, source=source))
