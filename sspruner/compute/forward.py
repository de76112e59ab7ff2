"""Run a model's forward on its own device, in eval mode, with only the arguments that it accepts."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from sspruner.errors import ModelError


def forward(model: nn.Module, tokens: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> Any:
    """Call model(input_ids=tokens, attention_mask=mask, **options), without arguments that it does not accept.

    tokens: int64 (b, T). mask: bool (b, T), False where padding. mamba_ssm's models accept neither mask nor use_cache.
    """
    device = next(model.parameters(), tokens).device
    if mask is not None:
        options["attention_mask"] = mask.to(device).long()
    accepted_names = accepted(model)
    training = model.training
    model.eval()
    try:
        return model(input_ids=tokens.to(device), **{k: v for k, v in options.items() if k in accepted_names})
    finally:
        model.train(training)


def accepted(model: Any) -> set[str]:
    """Return the names of the arguments of this package that a model's forward accepts."""
    parameters = inspect.signature(model.forward).parameters
    names = {*parameters, "cache_params", "past_key_values"}
    native = hasattr(model, "allocate_inference_cache")  # passes unknown keywords on to its mixers
    if not native and any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        names |= {"attention_mask", "use_cache"}  # some models of transformers only pass these on
    return names


def embedding(model: Any) -> nn.Embedding:
    """Return the module that embeds tokens. Raises ModelError if there is none."""
    table: nn.Embedding | None = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    table = table or next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    if table is None:
        raise ModelError(f"{type(model).__name__}: no embedding found; it cannot be run on tokens")
    return table
