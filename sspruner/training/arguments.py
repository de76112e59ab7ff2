"""Arguments of a training function: a recipe, or short arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from sspruner.recipes.common import recipe_or_short
from sspruner.recipes.train import TrainText
from sspruner.training.text import Text

Recipe = TypeVar("Recipe", bound=Any)


def recipe_of(
    kind: type[Recipe], recipe: Any, text: Text, short: Mapping[str, Any], aliases: Mapping[str, str] | None = None
) -> Recipe:
    """Return a recipe, or one made from short arguments, with the training text.

    Without `settings`, the sequence length is the text's. Raises InputError for unknown arguments and for values out
    of range.
    """
    arguments = {"seq_len": text.seq_len, **short} if recipe is None and short.get("settings") is None else short
    result = recipe_or_short(kind, recipe, arguments, aliases)
    return replace(result, text=TrainText(text.sources, text.held_out))
