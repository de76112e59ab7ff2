"""Write new values and zeros into a model's tensors; add and remove biases of linear layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sspruner.errors import PlanError
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.graph.trace import trace
from sspruner.plans.plan import Plan
from sspruner.surgery.blocks import retie


def tensor(model: nn.Module, name: str) -> torch.Tensor:
    """Return a parameter or buffer by its full name."""
    owner, _, leaf = name.rpartition(".")
    value: torch.Tensor = getattr(model.get_submodule(owner), leaf)
    return value


def lacks(model: nn.Module, name: str) -> bool:
    """Return whether a linear layer has no bias of this name.

    Raises PlanError if the name is no bias of a linear layer.
    """
    owner, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        module = None
    if module is not None and module._parameters.get(leaf) is not None:
        return False
    if leaf != "bias" or not isinstance(module, nn.Linear):
        raise PlanError(f"{name}: the model has no such parameter")
    return True


@torch.no_grad()
def write_for_good(model: nn.Module, plan: Plan, graph: SSMGraph) -> SSMGraph:
    """Write a plan's new values and zeros.

    Returns the graph, traced again if biases were added, since they are cut, too.
    """
    added = new_biases(model, plan.updates)
    for name, value in plan.updates.items():
        if name in added:
            add_bias(model, name)
        write(tensor(model, name), value)
    for name, keep in plan.elements.items():
        zero(tensor(model, graph.elements[name].tensor), keep)
    return trace(model) if added else graph


def new_biases(model: nn.Module, updates: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names in `updates` that are biases the model lacks."""
    return [name for name in updates if lacks(model, name)]


def write(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Set a parameter's value, in its own dtype and on its own device. Raises PlanError for another shape."""
    if parameter.shape != value.shape:
        raise PlanError(f"a new value of shape {tuple(value.shape)} for a parameter of {tuple(parameter.shape)}")
    parameter.data.copy_(value)


def zero(parameter: torch.Tensor, keep: torch.Tensor) -> None:
    """Set the elements to zero that a mask, bool in the parameter's shape, does not keep."""
    parameter.data[~keep.to(parameter.device)] = 0


def add_bias(model: nn.Module, name: str) -> None:
    """Add a bias of zeros to a linear layer, shared by all layers that share its weight.

    Raises PlanError if there is no such layer, or if it has a bias.
    """
    if not lacks(model, name):
        raise PlanError(f"{name}: the model has this bias already")
    weight = _linear(model, name).weight
    _set_bias(model, weight, nn.Parameter(weight.new_zeros(len(weight)), requires_grad=weight.requires_grad))


def remove_bias(model: nn.Module, name: str) -> None:
    """Undo `add_bias`."""
    _set_bias(model, _linear(model, name).weight, None)


def _set_bias(model: nn.Module, weight: torch.Tensor, bias: nn.Parameter | None) -> None:
    holders = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight is weight
    ]
    for path, module in holders:
        module.register_parameter("bias", bias)
        parent, _, leaf = path.rpartition(".")
        mixer: Any = model.get_submodule(parent)
        if leaf == "out_proj" and hasattr(mixer, "use_bias"):  # Mamba1's fused kernel reads this flag, not the bias
            mixer.use_bias = bias is not None
    if len(holders) > 1:
        retie(model)


def _linear(model: nn.Module, bias: str) -> Any:
    return model.get_submodule(bias.rpartition(".")[0])
