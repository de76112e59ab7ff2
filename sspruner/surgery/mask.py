"""Mask mode: the units that a plan drops are set to zero in place. Reversible to the bit; sizes do not change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sspruner.errors import PlanError
from sspruner.graph.fingerprint import fingerprint
from sspruner.graph.group import DependencyGroup, Member, as_rows
from sspruner.graph.ssm_graph import SSMGraph, trace
from sspruner.planning.plan import Plan, Selection, check_plan

_SAVED = "_sspruner_masked"  # attribute of a masked model: [(tensor, dims, rows, original values)]


@torch.no_grad()
def mask(model: nn.Module, plan: Plan, graph: SSMGraph) -> None:
    """Zero, in every member, the rows of the units that `plan` drops. `unmask` restores the original bits.

    Raises PlanError if the model is masked already.
    """
    if getattr(model, _SAVED, None) is not None:
        raise PlanError("the model is masked already; call sspruner.unmask(model) first")
    setattr(model, _SAVED, [])
    for name, selection in plan.groups.items():
        mask_group(model, graph.groups[name], selection)


@torch.no_grad()
def mask_group(model: nn.Module, group: DependencyGroup, selection: Selection) -> None:
    """Mask one dependency group of a model, on top of what is masked already."""
    if getattr(model, _SAVED, None) is None:
        setattr(model, _SAVED, [])
    for name, dims, rows in dropped(group, selection, model):
        flat = as_rows(tensor(model, name).data, dims)
        rows = rows.to(flat.device)
        getattr(model, _SAVED).append((name, dims, rows, flat.index_select(0, rows)))
        _write(model, name, dims, rows, torch.zeros_like(flat[rows]))


def unmask(model: nn.Module) -> None:
    """Undo `mask`: every parameter has its original bits again. Does nothing on a model that is not masked."""
    for name, dims, rows, values in reversed(getattr(model, _SAVED, None) or []):
        _write(model, name, dims, rows, values)
    setattr(model, _SAVED, None)


def _write(model: nn.Module, name: str, dims: tuple[int, ...], rows: torch.Tensor, values: torch.Tensor) -> None:
    """Write rows in place: through a view of the tensor where its dimensions lie apart."""
    data = tensor(model, name).data
    front = data.movedim(dims, tuple(range(len(dims))))  # a view
    at = torch.unravel_index(rows.to(data.device), front.shape[: len(dims)])
    front[at] = values.to(data.device, data.dtype)


@contextmanager
def masked(model: nn.Module, plan: Plan, graph: SSMGraph | None = None) -> Iterator[nn.Module]:
    """The model with `plan` as a mask, inside a `with` block. graph: the model's, where it is at hand.

    Raises PlanError if the plan does not fit the model.
    """
    if graph is None:
        graph = trace(model)
        check_plan(plan, graph, fingerprint(model))
    mask(model, plan, graph)
    try:
        yield model
    finally:
        unmask(model)


def dropped(
    group: DependencyGroup, selection: Selection, model: nn.Module
) -> Iterator[tuple[str, tuple[int, ...], torch.Tensor]]:
    """(tensor, dims, rows) of everything that dropped units own; of dropped modules, what writes their contribution."""
    for member in group.members:
        yield member.tensor, member.dims, dropped_rows(member, selection)
    for unit in selection.dropped(0) if group.blocks else ():
        for name in group.blocks[unit].writers:
            yield name, (0,), torch.arange(len(tensor(model, name)))


def dropped_rows(member: Member, selection: Selection) -> torch.Tensor:
    """The rows of the member's tensor that belong to dropped units: int64 (rows,)."""
    parts = [member.index[g, selection.dropped(g)].flatten() for g in range(len(selection.keep))]
    return torch.cat(parts)


def tensor(model: nn.Module, name: str) -> torch.Tensor:
    """A parameter or buffer by its full name."""
    owner, _, leaf = name.rpartition(".")
    found: torch.Tensor = getattr(model.get_submodule(owner), leaf)
    return found


def is_masked(model: nn.Module) -> bool:
    """Whether a plan is applied to `model` as a mask."""
    return getattr(model, _SAVED, None) is not None
