"""Remove whole modules: blocks leave their list and the others are renumbered; a mixer is replaced by `Nothing`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sspruner.axes import axis_of
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Selection


class Nothing(nn.Module):
    """Replacement of a dropped mixer: adds nothing to the residual stream.

    The norm before it stays, and its weight still gets a (zero) gradient, which data-parallel training waits for.
    """

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        # Keep the mixer's buffers: the model's initialisation may fill them, and a loader cuts them by their module.
        self._buffers = mixer._buffers
        self._non_persistent_buffers_set = set(mixer._buffers)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return zeros in the shape of hidden_states, (b, T, hidden size)."""
        return hidden_states * 0


def drop_blocks(model: nn.Module, plan: Plan, graph: SSMGraph) -> None:
    """Remove the modules that `plan` drops on the axes `mixer` and `block`, and the modules that only they use."""
    for name, selection in plan.groups.items():
        group = graph.groups[name]
        dropped_blocks = [group.blocks[unit] for unit in selection.dropped(0)] if group.blocks else []
        for block in dropped_blocks:
            for path in block.extras:
                _put(model, path, nn.Identity())
            if group.axis == "mixer":
                _put(model, block.path, Nothing(model.get_submodule(block.path)))
    for name, selection in plan.groups.items():  # after the mixers, whose paths use the old block numbers
        if axis_of(name) == "block" and isinstance(selection, Selection):
            _keep(model, graph, name.rpartition(":")[0], selection.keep[0])


def _keep(model: Any, graph: SSMGraph, path: str, keep: tuple[int, ...]) -> None:
    """Keep some blocks of a list; repair layer numbers, the config's lists, lookup tables and tied names."""
    old = model.get_submodule(path)
    _put(model, path, nn.ModuleList(old[i] for i in keep))
    for new, i in enumerate(keep):
        for module in old[i].modules():
            if getattr(module, "layer_idx", None) == i:
                module.layer_idx = new
    if graph.family:
        graph.family.keep_blocks(model, keep)
    retie(model)


def retie(model: Any) -> None:
    """Recompute which names share a parameter; transformers reads it when it saves and when it loads."""
    for module in [m for m in model.modules() if getattr(m, "_tied_weights_keys", None)]:
        first: dict[int, str] = {}
        tied = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            source = first.setdefault(id(parameter), name)
            if source != name:
                tied[name] = source
        module._tied_weights_keys = tied
        if hasattr(module, "all_tied_weights_keys"):
            module.all_tied_weights_keys = dict(tied)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)
