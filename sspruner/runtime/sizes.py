"""The sizes of a cut model, as data: what has to change in one that is built from a stock config."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

PLAIN = (bool, int, float, str)


def sizes_of(model: nn.Module, stock: nn.Module) -> dict[str, Any]:
    """What differs in `model` from `stock`, built from a config alone: JSON that `resize` takes.

    shapes: parameter -> its shape; attributes: module -> numbers and words that its forward reads.
    """
    built = {name: p.shape for name, p in stock.named_parameters(remove_duplicate=False)}
    held = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    modules = dict(stock.named_modules())
    attributes = {}
    for path, module in model.named_modules():
        before, own = vars(modules[path]), {k: v for k, v in vars(module).items() if type(v) in PLAIN}
        other = {k: v for k, v in own.items() if before.get(k) != v and k != "training" and not k.startswith("_")}
        if other:
            attributes[path] = other
    return {
        "shapes": {name: list(shape) for name, shape in held.items() if built.get(name) != shape},
        "attributes": attributes,
    }


def resize(model: nn.Module, sizes: dict[str, Any]) -> None:
    """Give a model that was built from its config the sizes that its weights have. Values come later, by name."""
    for name, shape in sizes["shapes"].items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        held = module._parameters.get(leaf)
        module.register_parameter(leaf, nn.Parameter(torch.empty(shape) if held is None else held.new_empty(shape)))
    for path, attributes in sizes["attributes"].items():
        vars(model.get_submodule(path)).update(attributes)
