"""Slice mode: the units that a plan drops leave the tensors. Works on meta tensors too: that is how files load."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn

from sspruner.errors import PlanError
from sspruner.graph.group import DependencyGroup
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.planning.plan import Plan, Selection
from sspruner.surgery.mask import dropped_rows

RECORD = "sspruner"  # key in config.json


def slice_model(model: nn.Module, plan: Plan, graph: SSMGraph) -> None:
    """Remove, from every member, the rows of the units that `plan` drops, and record the cut in the config."""
    _cut(model, plan, graph)
    record(model, plan, graph)


def slice_recorded(model: nn.Module, plan: Plan, graph: SSMGraph) -> None:
    """Bring a freshly built model to the sizes that its config records. Raises PlanError if it cannot be.

    Groups that have their final size already are left alone: the config's stock field gave it to them.
    """
    todo = {}
    for name, selection in plan.groups.items():
        group = graph.groups.get(name)
        if group is None or group.units not in (selection.before, selection.after):
            raise PlanError(f"config.json: records a cut of {name} that does not fit the model that it describes")
        if group.units == selection.before:
            todo[name] = selection
    _cut(model, Plan(plan.axis, todo), graph)


@torch.no_grad()
def _cut(model: nn.Module, plan: Plan, graph: SSMGraph) -> None:
    """Drop rows, fold, and set the attributes that forward reads."""
    rows: dict[tuple[str, int], list[torch.Tensor]] = defaultdict(list)
    for name, selection in plan.groups.items():
        for member in graph.groups[name].members:
            rows[member.parameter, member.dim].append(dropped_rows(member, selection))
    for (parameter, dim), parts in rows.items():
        _drop(model, parameter, dim, torch.cat(parts))
    for name, selection in plan.groups.items():
        group = graph.groups[name]
        _fold(model, group, selection)
        for attribute, value in group.attribute_values(selection.after).items():
            owner, _, leaf = f"{group.layer}.{attribute}".rpartition(".")
            setattr(model.get_submodule(owner), leaf, value)


def _drop(model: nn.Module, name: str, dim: int, rows: torch.Tensor) -> None:
    """Replace a parameter by one without `rows`."""
    old = model.get_parameter(name)
    keep = torch.ones(old.shape[dim], dtype=torch.bool, device="cpu")
    keep[rows] = False
    kept = old.data.index_select(dim, keep.nonzero().flatten().to(old.device))
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(kept, requires_grad=old.requires_grad))


def _fold(model: nn.Module, group: DependencyGroup, selection: Selection) -> None:
    """Norms over the cut units average over fewer: scale their weight and epsilon (see graph.group.Fold)."""
    factor = selection.before / selection.after
    for member in group.members:
        if member.fold is None:
            continue
        model.get_parameter(member.parameter).data.mul_(factor**0.5)
        owner, _, leaf = f"{group.layer}.{member.fold.eps}".rpartition(".")
        norm = model.get_submodule(owner)
        setattr(norm, leaf, getattr(norm, leaf) * factor)


def record(model: nn.Module, plan: Plan, graph: SSMGraph) -> None:
    """Write into model.config what was cut: `sspruner`, and the stock field where one size serves all layers.

    The record composes: after several cuts it holds one selection per dependency group, in the indices of the
    original model, so that the loader can repeat the cut on freshly built modules.
    """
    config: Any = model.config
    previous = recorded(config)
    groups = dict(previous.groups) if previous else {}
    for name, selection in plan.groups.items():
        groups[name] = groups[name].then(selection) if name in groups else selection
    stock = dict((getattr(config, RECORD, None) or {}).get("stock", {}))
    for name in plan.groups:
        layer = next(layer for layer in graph.layers if layer.path == graph.groups[name].layer)
        field = layer.family.config_names.get(plan.axis)
        if field is None:
            continue
        stock.setdefault(field, getattr(config, field))
        everywhere = {groups[n].after if n in groups else g.units for n, g in graph.on_axis(plan.axis).items()}
        # One value for all layers: stock classes load the result. Otherwise the original value stays, and they refuse.
        setattr(config, field, everywhere.pop() if len(everywhere) == 1 else stock[field])
    setattr(config, RECORD, {**Plan(plan.axis, groups).to_json(), "stock": stock})


def recorded(config: Any) -> Plan | None:
    """The cut that a config records, in the indices of the original model; None if it records none."""
    data = getattr(config, RECORD, None)
    return Plan.from_json(data, "config.json, key 'sspruner'") if data else None
