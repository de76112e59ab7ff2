"""Trained elements: what a reconstruction changes in one cut module, read from the layout of its family.

Of a module whose units were cut, the elements of the units that stay are trained: what the dependency group of the axis
lists, and nothing else. Where the state was projected, these are the rows of B and C, and the projection itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from sspruner.compute.quick_scan import Wanted
from sspruner.graph.layout import DECODE, ENCODE
from sspruner.graph.site import Site
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Projection
from sspruner.surgery.mask import dropped_rows
from sspruner.surgery.tensors import tensor

Run = tuple[str, tuple[int, ...], torch.Tensor, str]  # parameter, its dims, rows along them, name of the rows


@dataclass(frozen=True)
class Trained:
    """What is trained of one module.

    elements    parameter, relative to the module -> bool, in its shape: True for what is trained
    rows        names of the rows in the layout to which these belong
    projection  of the module's state, whose encode and decode are trained, too; None for a selection
    """

    elements: dict[str, torch.Tensor]
    rows: frozenset[str]
    projection: Projection | None

    @property
    def wanted(self) -> Wanted:
        """Return what the scan of a mixer has to compute gradients for."""
        conv = self.elements.get("conv1d.weight", torch.zeros(0, 1))
        return Wanted(self.rows, conv.flatten(1).any(1).nonzero().flatten())


def trained_elements(model: nn.Module, plan: Plan, graph: SSMGraph, site: Site) -> Trained:
    """Return what is trained of a module by a plan: of every group that is cut here, what stays of its units."""
    groups = [graph.groups[name] for name in plan.groups if name.rpartition(":")[0] == site.path]
    elements: dict[str, torch.Tensor] = {}
    names = set()
    projection = None
    for group in groups:
        reduction = plan.groups[group.name]
        if isinstance(reduction, Projection):
            projection = reduction
        members = [(m.tensor, m.dims, m.index.flatten(), m.rows) for m in group.members if m.counted]
        runs = _rows_of_state(model, site) if isinstance(reduction, Projection) else iter(members)
        for name, dims, rows, run in runs:
            _mark(elements, model, name, dims, rows, value=True)
            names.add(run)
    for group in groups:  # a row may be cut on one axis, and a column of it on another
        for member in group.members:
            if member.counted and member.tensor in elements:
                gone = dropped_rows(member, plan.groups[group.name])
                _mark(elements, model, member.tensor, member.dims, gone, value=False)
    relative = {name.removeprefix(f"{site.path}."): mark for name, mark in elements.items()}
    return Trained({name: mark for name, mark in relative.items() if mark.any()}, frozenset(names), projection)


def _rows_of_state(model: nn.Module, site: Site) -> Iterator[Run]:
    """Yield the rows of B and C, from which a projected state is computed."""
    layout = site.layout
    dim = "row" if layout.is_projected else "state"
    parameters = dict(model.get_submodule(site.path).named_parameters(remove_duplicate=False))
    for slot in layout.slots:
        for rows in slot.rows if slot.tensor in parameters and slot.tensor not in (ENCODE, DECODE) else ():
            if dim in rows.dims:
                yield f"{site.path}.{slot.tensor}", slot.tensor_dims, layout.rows_of(slot, rows).flatten(), rows.name


def _mark(
    elements: dict[str, torch.Tensor],
    model: nn.Module,
    name: str,
    dims: tuple[int, ...],
    rows: torch.Tensor,
    *,
    value: bool,
) -> None:
    """Set rows of a parameter's mask, along several flattened dims if there are several."""
    mask = elements.setdefault(name, torch.zeros(tensor(model, name).shape, dtype=torch.bool))
    front = mask.movedim(dims, tuple(range(len(dims))))  # a view
    front[torch.unravel_index(rows, front.shape[: len(dims)])] = value
