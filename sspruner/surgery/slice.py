"""Slice mode: remove the units that a plan drops from the tensors. Works on meta tensors, too, as the loader needs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sspruner.axes import axis_of
from sspruner.graph.experts import EXPERTS
from sspruner.graph.group import Gain, drop_rows
from sspruner.graph.layout import Layout
from sspruner.graph.site import Site
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Projection
from sspruner.surgery.blocks import drop_blocks
from sspruner.surgery.mask import dropped_rows
from sspruner.surgery.project import project_states
from sspruner.surgery.tensors import tensor

Cuts = Mapping[tuple[int, ...], torch.Tensor]  # dimensions of a tensor, flattened -> the rows to remove


@torch.no_grad()
def slice_model(
    model: nn.Module, plan: Plan, graph: SSMGraph, later: list[tuple[torch.nn.Module, str, Cuts]] | None = None
) -> None:
    """Project the states that `plan` projects, then remove the rows of dropped units, then dropped modules.

    Parameters that several modules share stay shared. `surgery.record` writes the cut into the config. later: list to
    which the cuts of buffers that no checkpoint has, (module, name, cuts), are appended instead of being made; the
    loader makes them at the end.
    """
    plan, graph = project_states(model, plan, graph)
    for name, reduction in plan.groups.items():
        gain = graph.groups[name].gain
        if gain and any(reduction.dropped(g) != reduction.dropped(0) for g in range(reduction.sets)):
            move_gain(model, gain)
    for name, cuts in rows_to_drop(plan, graph).items():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        if later is not None and leaf in owner._non_persistent_buffers_set:
            later.append((owner, leaf, cuts))
        else:
            _drop(model, getattr(owner, leaf), cuts)
    for site in graph.sites:
        before, after = site.layout, cut_layout(site, plan, graph)
        if before.sizes != after.sizes:
            for path in (site.path, *site.aliases):
                _correct(model.get_submodule(path), after)
                if site.family:
                    site.family.fit(model.get_submodule(path))
            fold_values(model, site, before, after)
            _correct_whole(model, site, before, after)
    drop_blocks(model, plan, graph)


def cut_buffer(module: nn.Module, leaf: str, cuts: Cuts) -> None:
    """Make a cut of a buffer that `slice_model` deferred."""
    module._buffers[leaf] = without_rows(module._buffers[leaf], cuts)  # type: ignore[arg-type]


def move_gain(model: nn.Module, gain: Gain) -> None:
    """Multiply factors that all sets share into the matrix that reads the units, and make them 1: the same function."""
    factors, matrix = tensor(model, gain.tensor).data, tensor(model, gain.into).data
    scale = factors[None, :, None].expand(gain.columns.shape).flatten()  # (columns,)
    columns = gain.columns.flatten().to(matrix.device)
    matrix[:, columns] = (matrix[:, columns] * scale).to(matrix.dtype)
    factors.fill_(1)


def rows_to_drop(plan: Plan, graph: SSMGraph) -> dict[str, dict[tuple[int, ...], torch.Tensor]]:
    """Return the rows to remove: tensor -> its dimensions -> int64 (rows,), without duplicates."""
    rows: dict[str, dict[tuple[int, ...], list[torch.Tensor]]] = defaultdict(lambda: defaultdict(list))
    for name, selection in plan.groups.items():
        group = graph.groups[name]
        for member in group.members:
            rows[member.tensor][member.dims].append(dropped_rows(member, selection))
        if group.gain:  # where the sets differ, its factors are all 1
            # The device is explicit because the loader cuts inside `torch.device("meta")`.
            rows[group.gain.tensor][(0,)].append(torch.tensor(selection.dropped(0), dtype=torch.long, device="cpu"))
    return {name: {dims: torch.unique(torch.cat(parts)) for dims, parts in by.items()} for name, by in rows.items()}


def cut_layout(site: Site, plan: Plan, graph: SSMGraph) -> Layout:
    """Return the layout of one module after the plan is applied."""
    state = plan.groups.get(f"{site.path}:state")
    layout = site.layout.projected(state.after) if isinstance(state, Projection) else site.layout
    return layout.resized(sizes_after(site, plan))


def sizes_after(site: Site, plan: Plan) -> Mapping[str, int]:
    """Return the new sizes of the dimensions of one module that the plan changes."""
    names = {axis: f"{site.path}:{axis}" for axis in site.layout.axes}
    sizes = {axis: plan.groups[name].after for axis, name in names.items() if name in plan.groups}
    if "hidden" in site.layout.sizes:
        for name, selection in plan.groups.items():
            if axis_of(name) == "hidden":
                sizes["hidden"] = selection.after
    return sizes


def _drop(model: nn.Module, old: torch.Tensor, cuts: Cuts) -> None:
    """Replace a tensor, in every module that has it, by one without some rows."""
    new = without_rows(old.data, cuts)
    replacement = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for leaf, value in tensors.items():
                if value is old:
                    tensors[leaf] = replacement  # type: ignore[assignment]
                    _correct_shape(module)


def without_rows(tensor: torch.Tensor, cuts: Cuts) -> torch.Tensor:
    """Return a tensor without some rows. Flattened dimensions are cut first: their row numbers count all other rows."""
    for dims, rows in sorted(cuts.items(), key=lambda item: -len(item[0])):
        tensor = drop_rows(tensor, dims, rows)
    return tensor


def _correct_shape(module: Any) -> None:
    """Correct the sizes that torch's own modules keep beside their weights."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv1d):  # depthwise: one filter per channel
        module.in_channels = module.out_channels = module.groups = module.weight.shape[0]
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]


def _correct(module: nn.Module, after: Layout) -> None:
    """Correct the integers that the module's forward reads."""
    for attribute, size in after.attributes.items():
        owner, leaf = _owner(module, attribute)
        if owner is not None:
            setattr(owner, leaf, after.total(size))


def _correct_whole(model: nn.Module, site: Site, before: Layout, after: Layout) -> None:
    """Correct the number of experts that a whole model keeps for its auxiliary loss, in every module around a site."""
    if site.kind != "experts" or before.count(EXPERTS) == after.count(EXPERTS):
        return
    parts = site.path.split(".")
    for depth in range(len(parts)):
        around = model.get_submodule(".".join(parts[:depth]))
        if isinstance(vars(around).get("num_experts"), int):
            around.num_experts = after.count(EXPERTS)  # type: ignore[assignment]


def fold_values(model: nn.Module, site: Site, before: Layout, after: Layout) -> None:
    """Scale the values that stay (see graph.layout.Fold): tensors once, attributes in every module that shares them."""
    for fold in after.folds:
        factor = before.count(fold.over) / after.count(fold.over)
        if factor == 1:
            continue
        owner, leaf = _owner(model.get_submodule(site.path), fold.target)
        value = getattr(owner, leaf, None)
        if isinstance(value, torch.Tensor):
            rows = slice(None)
            if fold.rows:
                slot = next(s for s in after.slots if s.tensor == fold.target and s.dim == 0)
                index = after.rows_of(slot, next(r for r in slot.rows if r.name == fold.rows)).flatten()
                rows = slice(int(index[0]), int(index[-1]) + 1)
            value.data[rows] = ((value.data[rows] + fold.offset) * factor**fold.power - fold.offset).to(value.dtype)
        elif value is not None:
            for path in (site.path, *site.aliases):
                holder, _ = _owner(model.get_submodule(path), fold.target)
                setattr(holder, leaf, value * factor**fold.power)


def _owner(module: nn.Module, attribute: str) -> tuple[nn.Module | None, str]:
    """Return the submodule that has the attribute, None if there is none, and the attribute's own name."""
    path, _, leaf = attribute.rpartition(".")
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        return None, leaf
    return (owner, leaf) if hasattr(owner, leaf) else (None, leaf)
