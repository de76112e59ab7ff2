"""Sizes of a cut model, as data: the differences from a model that is built from a stock config."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

PLAIN = (bool, int, float, str)


def sizes_of(model: nn.Module, stock: nn.Module) -> dict[str, Any]:
    """Return the differences between `model` and `stock`, built from a config alone, as JSON for `resize`.

    shapes: parameter, or buffer that is saved with them -> its shape; attributes: module -> numbers and strings that
    its forward reads.
    """
    built = {name: tensor.shape for name, tensor in stock.state_dict().items()}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    modules = dict(stock.named_modules())
    attributes = {}
    for path, module in model.named_modules():
        before, plain = vars(modules[path]), {k: v for k, v in vars(module).items() if type(v) in PLAIN}
        changed = {k: v for k, v in plain.items() if before.get(k) != v and k != "training" and not k.startswith("_")}
        if changed:
            attributes[path] = changed
    return {
        "shapes": {name: list(shape) for name, shape in shapes.items() if built.get(name) != shape},
        "attributes": attributes,
    }


def resize(model: nn.Module, sizes: dict[str, Any]) -> None:
    """Resize a model that was built from its config to the shapes of its weights. Values are loaded later, by name."""
    for name, shape in sizes["shapes"].items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if (buffer := module._buffers.get(leaf)) is not None:
            module._buffers[leaf] = buffer.new_empty(shape)
            continue
        parameter = module._parameters.get(leaf)
        module.register_parameter(
            leaf, nn.Parameter(torch.empty(shape) if parameter is None else parameter.new_empty(shape))
        )
    for path, attributes in sizes["attributes"].items():
        vars(model.get_submodule(path)).update(attributes)
