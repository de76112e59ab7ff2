"""Mask mode: set the units and elements that a plan drops to zero, in place. Sizes do not change.

Dropped experts are barred from the choice instead. New values of a plan are written first. Everything can be undone to
the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from sspruner.compute.device import offloaded
from sspruner.errors import PlanError
from sspruner.graph.fingerprint import fingerprint
from sspruner.graph.group import BARRED, BARRED_LOGITS, DependencyGroup, Member, as_rows
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.graph.trace import trace
from sspruner.plans.plan import Plan, check_mask, check_plan
from sspruner.plans.reduction import Basis, Projection, Reduction
from sspruner.surgery.project import install, mask_state
from sspruner.surgery.router import bar, unbar
from sspruner.surgery.tensors import add_bias, new_biases, remove_bias, tensor, write, zero

_SAVED = "_sspruner_masked"  # attribute of a masked model: the overwritten values, in order


@dataclass(frozen=True)
class _Saved:
    """Original values of one parameter: of `rows` along `dims`, of the elements that `keep` excludes, or all of them.

    values is None for a bias that the model did not have.
    """

    tensor: str
    values: torch.Tensor | None
    dims: tuple[int, ...] = ()
    rows: torch.Tensor | None = None
    keep: torch.Tensor | None = None


@dataclass(frozen=True)
class _SavedBasis:
    """Basis of a mixer's state before a projection was masked; None if the state was not projected."""

    layer: str
    projection: Projection
    basis: Basis | None


@dataclass(frozen=True)
class _SavedRouter:
    """A router, by its path, some of whose experts are barred by hooks."""

    path: str


@torch.no_grad()
def mask(model: nn.Module, plan: Plan, graph: SSMGraph) -> None:
    """Write the plan's new values; zero the rows of dropped units in every member, and the dropped elements.

    `unmask` restores the original bits. Raises PlanError if the model is masked already.
    """
    if getattr(model, _SAVED, None) is not None:
        raise PlanError("the model is masked already; call sspruner.unmask(model) first")
    setattr(model, _SAVED, [])
    try:
        if update_tensors(model, plan.updates):
            graph = trace(model)  # added biases belong to units, too
        for name, reduction in plan.groups.items():
            mask_group(model, graph.groups[name], reduction)
        for name, keep in plan.elements.items():
            mask_elements(model, graph.elements[name], keep)
    except BaseException:
        unmask(model)
        raise


@torch.no_grad()
def mask_group(model: nn.Module, group: DependencyGroup, reduction: Reduction) -> None:
    """Mask one dependency group of a model, in addition to earlier masks.

    Raises PlanError if the weights are on disk, where a mask of them would be lost.
    """
    _check_in_memory(model, [m.tensor for m in group.members] + [name for b in group.blocks for name in b.writers])
    saved = _saved(model)
    if isinstance(reduction, Projection):
        saved.append(_SavedBasis(group.layer, reduction, mask_state(model, group.layer, reduction)))
        return
    for name, dims, rows, value in dropped(group, reduction, model):
        flat = as_rows(tensor(model, name).data, dims)
        rows = rows.to(flat.device)
        saved.append(_Saved(name, flat.index_select(0, rows), dims, rows))
        _write_rows(model, name, dims, rows, torch.full_like(flat[rows], value))
    for member in group.members:
        if member.mask == BARRED_LOGITS:
            router = member.tensor.rpartition(".")[0]
            bar(model.get_submodule(router), dropped_rows(member, reduction))
            saved.append(_SavedRouter(router))


@torch.no_grad()
def mask_elements(model: nn.Module, group: DependencyGroup, keep: torch.Tensor) -> None:
    """Zero the elements of one tensor that `keep`, bool (rows, cols), excludes, in addition to earlier masks.

    Raises PlanError for a mask of another shape.
    """
    check_mask(keep, group)
    _check_in_memory(model, [group.tensor])
    data = tensor(model, group.tensor).data
    keep = keep.to(data.device)
    _saved(model).append(_Saved(group.tensor, data[~keep], keep=keep))
    zero(data, keep)


@torch.no_grad()
def update_tensors(model: nn.Module, updates: Mapping[str, torch.Tensor]) -> bool:
    """Write new values of parameters, full name -> value, in addition to earlier masks.

    Adds a bias that a linear layer lacks. Returns True if a bias was added: graphs traced before lack it. Raises
    PlanError for a parameter that does not exist, or that has another shape.
    """
    saved, added = _saved(model), new_biases(model, updates)
    _check_in_memory(model, [name for name in updates if name not in added])
    for name, value in updates.items():
        if name in added:
            add_bias(model, name)
        saved.append(_Saved(name, None if name in added else tensor(model, name).data.clone()))
        write(tensor(model, name), value)
    return bool(added)


def unmask(model: nn.Module) -> None:
    """Undo `mask`: every parameter has its original bits again. Does nothing on a model that is not masked."""
    for saved in reversed(getattr(model, _SAVED, None) or []):
        if isinstance(saved, _SavedBasis):
            install(model, saved.layer, saved.basis)
        elif isinstance(saved, _SavedRouter):
            unbar(model.get_submodule(saved.path))
        elif saved.values is None:
            remove_bias(model, saved.tensor)
        elif saved.rows is not None:
            _write_rows(model, saved.tensor, saved.dims, saved.rows, saved.values)
        else:
            data = tensor(model, saved.tensor).data
            where = ... if saved.keep is None else ~saved.keep.to(data.device)
            data[where] = saved.values.to(data.device, data.dtype)
    setattr(model, _SAVED, None)


def _saved(model: nn.Module) -> list[_Saved | _SavedBasis | _SavedRouter]:
    if getattr(model, _SAVED, None) is None:
        setattr(model, _SAVED, [])
    saved: list[_Saved | _SavedBasis | _SavedRouter] = getattr(model, _SAVED)
    return saved


def _check_in_memory(model: nn.Module, names: list[str]) -> None:
    """Raise PlanError for a parameter that is on disk: changes of it would be lost."""
    for name in names if offloaded(model) else ():
        if tensor(model, name).is_meta:
            raise PlanError(f"{name} is on disk: an offloaded model is cut by sspruner.prune alone")


def _write_rows(model: nn.Module, name: str, dims: tuple[int, ...], rows: torch.Tensor, values: torch.Tensor) -> None:
    """Write rows in place, through a view of the tensor if its dimensions are not adjacent."""
    data = tensor(model, name).data
    front = data.movedim(dims, tuple(range(len(dims))))  # a view
    at = torch.unravel_index(rows.to(data.device), front.shape[: len(dims)])
    front[at] = values.to(data.device, data.dtype)


@contextmanager
def masked(model: nn.Module, plan: Plan, graph: SSMGraph | None = None) -> Iterator[nn.Module]:
    """Context manager that applies `plan` as a mask. graph: the model's graph, if known.

    Raises PlanError if the plan does not fit the model.
    """
    if graph is None:
        graph = trace(model)
        check_plan(plan, graph, fingerprint(model), model)
    mask(model, plan, graph)
    try:
        yield model
    finally:
        unmask(model)


def dropped(
    group: DependencyGroup, reduction: Reduction, model: nn.Module
) -> Iterator[tuple[str, tuple[int, ...], torch.Tensor, float]]:
    """Yield (tensor, dims, rows, masked value) of dropped units.

    For dropped modules these are the parameters that write their output.
    """
    for member in group.members:
        yield member.tensor, member.dims, dropped_rows(member, reduction), -torch.inf if member.mask == BARRED else 0.0
    for unit in reduction.dropped(0) if group.blocks else ():
        for name in group.blocks[unit].writers:
            yield name, (0,), torch.arange(len(tensor(model, name))), 0.0


def dropped_rows(member: Member, reduction: Reduction) -> torch.Tensor:
    """Return the rows of the member's tensor that belong to dropped units: int64 (rows,)."""
    parts = [member.index[g, reduction.dropped(g)].flatten() for g in range(reduction.sets)]
    return torch.cat(parts)


def is_masked(model: nn.Module) -> bool:
    """Return whether a plan is applied to `model` as a mask."""
    return getattr(model, _SAVED, None) is not None


def added_biases(model: nn.Module) -> list[str]:
    """Return the names of the biases of a masked model that `unmask` removes."""
    saved = getattr(model, _SAVED, None) or []
    return [s.tensor for s in saved if isinstance(s, _Saved) and s.values is None]


def barred_routers(model: nn.Module) -> list[str]:
    """Return the paths of the routers of a masked model whose dropped experts are barred by hooks, not by a tensor."""
    saved = getattr(model, _SAVED, None) or []
    return [s.path for s in saved if isinstance(s, _SavedRouter)]


def masked_projections(model: nn.Module) -> dict[str, Projection]:
    """Return the masked projections of a model, by dependency group, in full size on the meta device, for a record."""
    saved = getattr(model, _SAVED, None) or []
    full = {f"{s.layer}:state": (s.projection.sets, s.projection.before) for s in saved if isinstance(s, _SavedBasis)}
    return {name: Projection(*2 * (torch.empty(sets, n, n, device="meta"),)) for name, (sets, n) in full.items()}
