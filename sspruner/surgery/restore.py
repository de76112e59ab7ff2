"""Restore a model after a cut that failed: every bit, shape, module and field of its config is as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sspruner.graph.ssm_graph import SSMGraph
from sspruner.plans.plan import Plan

Contents = list[tuple[Any, Any]]  # an object that the cut may change in place, and a copy of what it holds


@contextmanager
def restored_on_error(model: nn.Module, plan: Plan, graph: SSMGraph) -> Iterator[None]:
    """Context manager in which a plan is cut; if that fails, the model is what it was.

    Until the end, the tensors that are replaced stay in memory; those that are changed in place are copied.
    """
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    storages = [(t, t.data) for t in tensors.values()]
    changed = [
        (t, t.data.clone()) for name in _changed_in_place(model, plan, graph) if (t := _find(model, name)) is not None
    ]
    contents = [pair for module in model.modules() for pair in _contents(module.__dict__)]
    configs = {id(c): c for module in model.modules() if (c := module.__dict__.get("config")) is not None}
    while deeper := {id(c): c for holder in configs.values() for c in _configs_in(holder) if id(c) not in configs}:
        configs |= deeper
    contents += [pair for config in configs.values() for pair in _contents(vars(config))]
    try:
        yield
    except BaseException:
        for holder, held in contents:
            _put_back(holder, held)
        for t, data in storages:
            t.data = data
        for t, value in changed:
            t.data.copy_(value)
        raise


def _changed_in_place(model: nn.Module, plan: Plan, graph: SSMGraph) -> set[str]:
    """Return the names of tensors that a cut may write into: new values, zeros, folds, and gains that move."""
    written = {*plan.updates, *(graph.elements[name].tensor for name in plan.elements)}
    gains = [group.gain for name, group in graph.groups.items() if name in plan.groups and group.gain]
    written |= {name for gain in gains for name in (gain.tensor, gain.into)}
    return written | {f"{site.path}.{fold.target}" for site in graph.sites for fold in site.layout.folds}


def _find(model: nn.Module, name: str) -> torch.Tensor | None:
    """Return a parameter or buffer by its full name; None if there is none, as for a bias that the cut adds."""
    owner, _, leaf = name.rpartition(".")
    try:
        value = getattr(model.get_submodule(owner), leaf, None)
    except AttributeError:
        return None
    return value if isinstance(value, torch.Tensor) else None


def _contents(holder: Any) -> Contents:
    """Return a dict with the dicts, lists and sets in it, at any depth, each with a copy."""
    found: Contents = [(holder, holder.copy())]
    values = holder.values() if isinstance(holder, dict) else holder
    for value in values:
        if type(value) in (dict, list, set):
            found += _contents(value)
    return found


def _configs_in(config: Any) -> list[Any]:
    return [
        value for value in vars(config).values() if type(value).__module__ != "builtins" and hasattr(value, "to_dict")
    ]


def _put_back(holder: Any, held: Any) -> None:
    holder.clear()
    holder.extend(held) if isinstance(holder, list) else holder.update(held)
