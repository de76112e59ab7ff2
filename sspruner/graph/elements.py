"""Dependency groups for the pruning of single elements: one group per tensor whose elements may be set to zero.

weight   the weight of every linear layer inside the repeated blocks: (out features, in features)
decay    A_log of Mamba1's mixers: (channels, states). A zero in A_log is a decay rate of -1, not a missing state

Embeddings, norms, convolutions, D, dt_bias and Mamba2's A_log are never pruned this way (docs/methods.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from sspruner.graph.group import DependencyGroup

if TYPE_CHECKING:
    from sspruner.graph.site import Site


def element_groups(model: nn.Module, sites: list[Site], blocks: str) -> dict[str, DependencyGroup]:
    """Return the dependency groups of the axes `weight` and `decay`, one for each parameter, shared or not."""
    outer = (f"{blocks}.",) if blocks else tuple(f"{site.path}." for site in sites if site.family)
    runs = {f"{site.path}.{tensor}": _runs(site, tensor) for site in sites for tensor in _tensors(site)}
    groups: dict[int, DependencyGroup] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear) and path.startswith(outer):
            name = f"{path}.weight"
            groups.setdefault(id(module.weight), _group(path, "weight", name, module.weight, runs.get(name, {})))
    for site in sites:
        decay = getattr(model.get_submodule(site.path), "A_log", None) if site.family else None
        if isinstance(decay, nn.Parameter) and decay.ndim == 2:
            groups.setdefault(id(decay), _group(site.path, "decay", f"{site.path}.A_log", decay, {}))
    return {group.name: group for group in groups.values()}


def _group(layer: str, axis: str, name: str, tensor: torch.Tensor, runs: dict[str, torch.Tensor]) -> DependencyGroup:
    rows, columns = tensor.shape
    return DependencyGroup(layer, axis, rows, columns, (), tensor=name, runs=runs)


def _tensors(site: Site) -> set[str]:
    return {slot.tensor for slot in site.layout.slots}


def _runs(site: Site, tensor: str) -> dict[str, torch.Tensor]:
    """Return the row numbers of each run of a tensor's rows, by name, such as B and C of in_proj."""
    return {
        rows.name: site.layout.rows_of(slot, rows).flatten()
        for slot in site.layout.slots
        if slot.tensor == tensor and slot.tensor_dims == (0,)
        for rows in slot.rows
    }
