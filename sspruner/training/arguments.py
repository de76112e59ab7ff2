"""Arguments of a training function: a recipe, or short arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from sspruner.errors import InputError
from sspruner.recipes.common import recipe_or_short
from sspruner.recipes.train import GradualRecipe
from sspruner.training.examples import Examples
from sspruner.training.text import Text

Recipe = TypeVar("Recipe", bound=Any)


def recipe_of(
    kind: type[Recipe],
    recipe: Any,
    text: Text | Examples,
    short: Mapping[str, Any],
    aliases: Mapping[str, str] | None = None,
) -> Recipe:
    """Return a recipe, or one made from short arguments, with the training text.

    Without `settings`, the sequence length is the text's; with examples it is always 1. Raises InputError for unknown
    arguments, for values out of range, and for examples where only text is trained on.
    """
    arguments = {"seq_len": text.seq_len, **short} if recipe is None and short.get("settings") is None else short
    result = recipe_or_short(kind, recipe, arguments, aliases)
    if isinstance(text, Text):
        source = replace(result.text, text=text.sources, held_out=text.held_out, text_column=text.column)
        return replace(result, text=source)
    if kind is not GradualRecipe:
        raise InputError("training examples: gradual pruning alone takes them; this method trains language models")
    source = replace(result.text, text=(), held_out=text.held_out)
    return replace(result, text=source, settings=replace(result.settings, seq_len=Examples.seq_len))
