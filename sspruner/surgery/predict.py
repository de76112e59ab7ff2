"""Predict what a plan removes, from the graph, before anything is changed. The proof compares it with the cut model."""

from __future__ import annotations

from math import prod

import torch
from torch import nn

from sspruner.axes import axis_of
from sspruner.graph.group import drop_rows
from sspruner.graph.layout import state_bytes
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Selection
from sspruner.surgery.project import added_by_projections
from sspruner.surgery.slice import Cuts, cut_layout, rows_to_drop
from sspruner.surgery.tensors import new_biases, tensor


def removed_parameters(model: nn.Module, plan: Plan, graph: SSMGraph) -> int:
    """Return the number of parameters that `plan` removes; one that several modules share counts once."""
    dropped = dropped_modules(plan, graph)
    used = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if not _inside(n, dropped)}
    left = {id(p): p.numel() if id(p) in used else 0 for p in model.parameters()}
    for name, cuts in rows_to_drop(plan, graph).items():
        parameter = tensor(model, name)
        if left.get(id(parameter)):
            extents = {dims: prod(parameter.shape[d] for d in dims) for dims in cuts}
            kept = prod(extents[dims] - len(rows) for dims, rows in cuts.items())
            left[id(parameter)] = parameter.numel() * kept // prod(extents.values())  # an integer: each cut is even
    return sum(p.numel() - left[id(p)] for p in model.parameters())


def added_parameters(model: nn.Module, plan: Plan, graph: SSMGraph) -> int:
    """Return the number of parameters of new biases and of the bases of projected states."""
    biases = sum(plan.updates[name].numel() for name in new_biases(model, plan.updates))
    return biases + added_by_projections(model, plan, graph)


def zeros_left(model: nn.Module, plan: Plan, graph: SSMGraph) -> dict[str, torch.Tensor]:
    """Return where the plan's element masks leave zeros after the cut: parameter, by its name then -> bool, its shape.

    Parameters that are removed as a whole are left out.
    """
    rows: dict[int, Cuts] = {id(tensor(model, name)): cuts for name, cuts in rows_to_drop(plan, graph).items()}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    zeros_of = {}
    for key, keep in plan.elements.items():
        owner = id(tensor(model, graph.elements[key].tensor))
        zeros = ~keep.cpu()
        for dims, removed_rows in sorted(rows.get(owner, {}).items(), key=lambda item: -len(item[0])):
            zeros = drop_rows(zeros, dims, removed_rows)
        left = [new for name in names[owner] if (new := _name_after(name, plan, graph))]
        if left:
            zeros_of[left[0]] = zeros
    return zeros_of


def _name_after(name: str, plan: Plan, graph: SSMGraph) -> str:
    """Return a parameter's name after the cut, since blocks are renumbered. "" if it is removed."""
    if _inside(name, dropped_modules(plan, graph)):
        return ""
    for group, selection in plan.groups.items():
        blocks = f"{group.rpartition(':')[0]}."
        if isinstance(selection, Selection) and axis_of(group) == "block" and name.startswith(blocks):
            number, _, rest = name.removeprefix(blocks).partition(".")
            return f"{blocks}{selection.keep[0].index(int(number))}.{rest}"
    return name


def removed_state_bytes(plan: Plan, graph: SSMGraph) -> int:
    """Return the bytes of recurrent state per sequence that `plan` removes."""
    dropped = dropped_modules(plan, graph)
    return sum(
        site.state_bytes - (0 if _inside(f"{site.path}.", dropped) else state_bytes(cut_layout(site, plan, graph)))
        for site in graph.layers
    )


def dropped_modules(plan: Plan, graph: SSMGraph) -> list[str]:
    """Return the paths of the modules that are removed as a whole."""
    paths = []
    for name, selection in plan.groups.items():
        group = graph.groups[name]
        for unit in selection.dropped(0) if group.blocks else ():
            paths += [group.blocks[unit].path, *group.blocks[unit].extras]
    return paths


def _inside(name: str, paths: list[str]) -> bool:
    return any(name.startswith(f"{path}.") for path in paths)
