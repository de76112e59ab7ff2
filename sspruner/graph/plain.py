"""Refuse tensors that something else computes: adapters, parametrizations, and masks of other libraries.

Cutting what is stored under another name, or rewritten before every forward, would break the model or do nothing.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from sspruner.errors import ModelError
from sspruner.graph.layout import Layout


def check_plain(module: nn.Module, path: str, layout: Layout) -> None:
    """Raise ModelError for a tensor of the layout that is no plain parameter or buffer, with what makes it one."""
    for slot in layout.slots:
        owner_name, _, leaf = slot.tensor.rpartition(".")
        try:
            owner = module.get_submodule(owner_name)
        except AttributeError:  # a tensor that the module lacks
            continue
        if why := _wrapped(owner, leaf):
            raise ModelError(f"{path}.{slot.tensor}: {why}")


def _wrapped(owner: Any, leaf: str) -> str:
    """Return what computes a tensor, and how to undo it; "" for a plain one."""
    if isinstance(getattr(owner, "base_layer", None), nn.Module):
        return "an adapter (LoRA) is on it; merge it first: model = model.merge_and_unload()"
    if parametrize.is_parametrized(owner, leaf):
        return (
            "torch computes it from others (parametrize, weight norm); first: "
            f"torch.nn.utils.parametrize.remove_parametrizations(module, {leaf!r})"
        )
    if f"{leaf}_orig" in owner._parameters:
        return f"a mask of torch.nn.utils.prune is on it; first: torch.nn.utils.prune.remove(module, {leaf!r})"
    if f"{leaf}_g" in owner._parameters:
        return "weight norm is on it; first: torch.nn.utils.remove_weight_norm(module)"
    return ""
