"""Compare all parameters and buffers of two models."""

from __future__ import annotations

import torch


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of every parameter and buffer, under all its names."""
    held = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach().clone() for name, tensor in held}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    """Check whether all names and bits are equal."""
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())
