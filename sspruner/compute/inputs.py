"""What a model reads: token ids, or values of another kind (series, patches, features), and under which name."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from sspruner.errors import ModelError

TOKENS = "input_ids"


def input_name(model: Any) -> str:
    """Return the argument of forward that takes what a model reads.

    It is `main_input_name` of its class, as in transformers, else `input_ids`, else the first argument.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    wanted = (getattr(model, "main_input_name", TOKENS), TOKENS)
    return next((name for name in wanted if name in names), names[0] if names else TOKENS)


def reads_tokens(model: Any) -> bool:
    """Check whether a model reads token ids."""
    return input_name(model) == TOKENS


def example_values(model: Any) -> torch.Tensor:
    """Return an example of the values that a model reads, from its `dummy_inputs`: (b, T, ...), floating point.

    Raises ModelError if there is none.
    """
    name = input_name(model)
    try:
        example = model.dummy_inputs[name]
    except (AttributeError, KeyError, TypeError):
        example = None
    if not isinstance(example, torch.Tensor) or example.ndim < 3 or not example.is_floating_point():
        raise ModelError(
            f"{type(model).__name__}: reads {name!r}, which are no token ids, and does not say their shape; give its "
            f"class dummy_inputs, such as {{{name!r}: torch.zeros(1, steps, channels)}}"
        )
    return example
