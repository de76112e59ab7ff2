"""Padding, the inverse of a slice: write a cut model's values into a larger model, with zeros in the other units."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sspruner.errors import PlanError
from sspruner.graph.group import BARRED, BARRED_LOGITS
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Reduction, Selection
from sspruner.surgery.slice import cut_layout, fold_values, rows_to_drop, without_rows


@torch.no_grad()
def pad(cut: nn.Module, graph: SSMGraph, large: nn.Module, target: SSMGraph) -> None:
    """Write the values of `cut` into the first units of every axis of `large`, and zeros elsewhere: the same function.

    Both models have the same modules and dtypes; graph and target are their graphs. A norm over zero units divides by
    all of them, so its weight is scaled back. Raises PlanError if `large` is smaller somewhere, has other parameters,
    or norms whose epsilon differs from what the cut would have made of it.
    """
    plan = _first_units(graph, target)
    dropped = rows_to_drop(plan, target)
    values, large_values = cut.state_dict(), large.state_dict()
    if other := sorted(values.keys() ^ large_values.keys()):
        raise PlanError(f"{other[0]} is in one of the models alone")
    parameters = dict(large.named_parameters())  # shared parameters once, under the name that graphs use
    buffers = {name: tensor for name, tensor in large.named_buffers() if name in large_values}
    empty = _empty(plan, target)
    for name, tensor in {**parameters, **buffers}.items():
        value = values[name]
        places = without_rows(torch.arange(tensor.numel()).view(tensor.shape), dropped.get(name, {}))
        if places.shape != value.shape:
            raise PlanError(f"{name} is {tuple(value.shape)}, and {tuple(places.shape)} where it is padded")
        tensor.fill_(empty.get(name, 0.0))
        tensor.view(-1)[places.flatten()] = value.to(tensor).flatten()
    for site in target.sites:
        after = cut_layout(site, plan, target)
        ours, theirs = cut.get_submodule(site.path), large.get_submodule(site.path)
        tensors = []
        for fold in after.folds:
            value, whole = _value(ours, fold.target), _value(theirs, fold.target)
            factor = site.layout.count(fold.over) / after.count(fold.over)
            if isinstance(whole, torch.Tensor):
                tensors.append(fold)
            elif whole is not None and not math.isclose(value, whole * factor**fold.power, rel_tol=1e-6):
                raise PlanError(f"{site.path}.{fold.target} is {value}, and {whole} where it is padded")
        fold_values(large, site, after, replace(site.layout, folds=tuple(tensors)))


def _first_units(graph: SSMGraph, target: SSMGraph) -> Plan:
    """Return the plan that cuts the large model to the sizes of the other, keeping the first units."""
    groups: dict[str, Reduction] = {}
    for name, group in target.groups.items():
        if name not in graph.groups and group.axis != "group":  # a layer with one group has no such axis
            raise PlanError(f"{name} is in one of the models alone")
        after = graph.groups[name].units if name in graph.groups else 1
        if after > group.units:
            raise PlanError(f"{name} has {after} units, and {group.units} where it is padded")
        if after < group.units:
            groups[name] = Selection(group.units, (tuple(range(after)),) * group.groups)
    return Plan(groups)


def _empty(plan: Plan, target: SSMGraph) -> dict[str, float]:
    """Return what the units that are added have instead of zeros, by tensor: a bias of -inf where experts are chosen.

    Raises PlanError for experts of a router without such a bias: with zeros they would be chosen.
    """
    members = [member for name in plan.groups for member in target.groups[name].members]
    for member in members:
        if member.mask == BARRED_LOGITS:
            raise PlanError(f"{member.tensor} has no bias that could bar an expert of zeros from the choice")
    return {member.tensor: -math.inf for member in members if member.mask == BARRED}


def _value(module: nn.Module, attribute: str) -> Any:
    path, _, leaf = attribute.rpartition(".")
    try:
        return getattr(module.get_submodule(path), leaf, None)
    except AttributeError:
        return None
