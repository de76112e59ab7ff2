"""Mask mode: the units that a plan drops are set to zero in place. Reversible to the bit; sizes do not change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sspruner.errors import PlanError
from sspruner.graph.fingerprint import fingerprint
from sspruner.graph.group import DependencyGroup, Member
from sspruner.graph.ssm_graph import SSMGraph, trace
from sspruner.planning.plan import Plan, Selection, check_plan

_SAVED = "_sspruner_masked"  # attribute of a masked model: [(parameter, dim, rows, original values)]


@torch.no_grad()
def mask(model: nn.Module, plan: Plan, graph: SSMGraph) -> None:
    """Zero, in every member, the rows of the units that `plan` drops. `unmask` restores the original bits.

    Raises PlanError if the model is masked already.
    """
    if getattr(model, _SAVED, None) is not None:
        raise PlanError("the model is masked already; call sspruner.unmask(model) first")
    saved: list[tuple[str, int, torch.Tensor, torch.Tensor]] = []
    setattr(model, _SAVED, saved)
    for name, selection in plan.groups.items():
        mask_group(model, graph.groups[name], selection)


def mask_group(model: nn.Module, group: DependencyGroup, selection: Selection) -> None:
    """Mask one dependency group of a model, on top of what is masked already."""
    if getattr(model, _SAVED, None) is None:
        setattr(model, _SAVED, [])
    for member in group.members:
        parameter = model.get_parameter(member.parameter).data
        rows = dropped_rows(member, selection).to(parameter.device)
        getattr(model, _SAVED).append((member.parameter, member.dim, rows, parameter.index_select(member.dim, rows)))
        parameter.index_fill_(member.dim, rows, 0)


def unmask(model: nn.Module) -> None:
    """Undo `mask`: every parameter has its original bits again. Does nothing on a model that is not masked."""
    for name, dim, rows, values in reversed(getattr(model, _SAVED, None) or []):
        parameter = model.get_parameter(name).data
        parameter.index_copy_(dim, rows.to(parameter.device), values.to(parameter.device, parameter.dtype))
    setattr(model, _SAVED, None)


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


def dropped_rows(member: Member, selection: Selection) -> torch.Tensor:
    """The rows of the member's parameter that belong to dropped units: int64 (rows,)."""
    parts = [member.index[g, selection.dropped(g)].flatten() for g in range(len(selection.keep))]
    return torch.cat(parts)


def is_masked(model: nn.Module) -> bool:
    """Whether a plan is applied to `model` as a mask."""
    return getattr(model, _SAVED, None) is not None
