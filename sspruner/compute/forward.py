"""Running a model: on its own device, in eval mode, with the arguments that its forward takes and no others."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from sspruner.errors import ModelError


def forward(model: nn.Module, tokens: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> Any:
    """model(input_ids=tokens, attention_mask=mask, **options); mamba_ssm's models take neither mask nor use_cache.

    tokens: int64 (b, T). mask: bool (b, T), False where padding.
    """
    device = next(model.parameters(), tokens).device
    if mask is not None:
        options["attention_mask"] = mask.to(device).long()
    taken = accepted(model)
    training = model.training
    model.eval()
    try:
        return model(input_ids=tokens.to(device), **{k: v for k, v in options.items() if k in taken})
    finally:
        model.train(training)


def accepted(model: Any) -> set[str]:
    """The names of the arguments that a model's forward takes, of those that this package gives."""
    parameters = inspect.signature(model.forward).parameters
    taken = {*parameters, "cache_params", "past_key_values"}
    native = hasattr(model, "allocate_inference_cache")  # hands keywords that it does not know on to its mixers
    if not native and any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        taken |= {"attention_mask", "use_cache"}  # some models of transformers only hand these on
    return taken


def embedding(model: Any) -> nn.Embedding:
    """The module that embeds tokens. Raises ModelError if there is none."""
    found: nn.Embedding | None = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    found = found or next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    if found is None:
        raise ModelError(f"{type(model).__name__}: no embedding found; it cannot be run on tokens")
    return found
