"""Gradients of the mean calibration loss, for scorers with needs="gradients"."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from sspruner.forward import forward
from sspruner.precision import in_fp32


def mean_gradients(
    model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], tokens: int
) -> dict[str, torch.Tensor]:
    """Gradient of the mean next-token loss over all calibration tokens: parameter name -> fp32, in its shape.

    batches: (tokens int64 (b, T), mask bool (b, T)), on the model's own text: logits at t predict t + 1, and only
    positions whose token and next token are not padding count. tokens: how many of those there are in all batches, so
    that any split into batches gives the same sum. A shared parameter has one gradient under all its names.
    """
    device = next(model.parameters()).device
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    try:
        with in_fp32(model), torch.enable_grad():
            model.requires_grad_(True)
            for ids, mask in batches:
                logits = forward(model, ids, mask, use_cache=False).logits
                counted = (mask[:, 1:] & mask[:, :-1]).to(device)  # (b, T-1)
                predicted, target = logits[:, :-1][counted], ids[:, 1:].to(device)[counted]  # (n, V), (n,)
                loss = F.cross_entropy(predicted.float(), target, reduction="sum") / tokens
                torch.autograd.backward(loss)
            return {
                name: torch.zeros_like(p) if p.grad is None else p.grad  # None: a part that the forward never calls
                for name, p in model.named_parameters(remove_duplicate=False)
            }
    finally:
        for p, wanted, grad in before:
            p.requires_grad_(wanted)
            p.grad = grad


def predicted_tokens(mask: torch.Tensor) -> int:
    """How many next tokens are predicted and count. mask: bool (S, T)."""
    return int((mask[:, 1:] & mask[:, :-1]).sum())
