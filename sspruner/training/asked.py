"""What a training function is asked for: a recipe, or short arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from sspruner.recipes.common import recipe_or_short
from sspruner.recipes.train import TrainText
from sspruner.training.text import Text

Recipe = TypeVar("Recipe", bound=Any)


def asked_recipe(
    kind: type[Recipe], recipe: Any, text: Text, short: Mapping[str, Any], aliases: Mapping[str, str] | None = None
) -> Recipe:
    """Return a recipe, or the one that short arguments make, with the text that is trained on.

    Without settings the length of a sequence is the text's. Raises InputError for unknown arguments and for values out
    of range.
    """
    given = {"seq_len": text.seq_len, **short} if recipe is None and short.get("settings") is None else short
    made = recipe_or_short(kind, recipe, given, aliases)
    return replace(made, text=TrainText(text.sources, text.held_out))
