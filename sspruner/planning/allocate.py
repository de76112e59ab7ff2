"""Allocation: from scores and a budget to a count per dependency group, and from counts to a plan."""

from __future__ import annotations

from typing import Any

import torch

from sspruner.errors import InputError, PlanError
from sspruner.graph.group import DependencyGroup
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.planning.plan import Plan, Selection
from sspruner.planning.scores import Scores


def plan(
    graph: SSMGraph,
    scores: Scores,
    *,
    sparsity: float | None = None,
    keep: int | None = None,
    allocation: str = "uniform",
    multiple_of: int = 1,
) -> Plan:
    """Keep the highest-scored units of every dependency group in `scores`.

    The budget is either `sparsity`, the fraction to remove in [0, 1), or `keep`, the units left in every set.
    Raises InputError for an impossible budget, PlanError if the scores do not fit the graph.
    """
    axes = {name.rpartition(":")[2] for name in scores.importance}
    if len(axes) != 1:
        raise PlanError(f"scores are on {len(axes)} axes; a plan is made from the scores of one")
    axis = axes.pop()
    groups = graph.on_axis(axis)
    counts = allocate(groups, sparsity=sparsity, keep=keep, allocation=allocation, multiple_of=multiple_of)
    selections = {}
    for name, importance in scores.importance.items():
        group = groups.get(name)
        if group is None or tuple(importance.shape) != (group.groups, group.units):
            raise PlanError(f"{name}: scores of shape {tuple(importance.shape)} do not fit this model; score it again")
        selections[name] = select(importance, counts[name])
    made_by = {**scores.metadata, **budget(sparsity, keep, allocation, multiple_of)}
    return Plan(axis, selections, {"fingerprint": scores.metadata.get("model", "")}, made_by)


def allocate(
    groups: dict[str, DependencyGroup],
    *,
    sparsity: float | None,
    keep: int | None,
    allocation: str = "uniform",
    multiple_of: int = 1,
) -> dict[str, int]:
    """Units to keep in every set of each dependency group. Raises InputError for a budget that none can meet."""
    check_budget(sparsity, keep, allocation, multiple_of)
    return {
        name: _checked_keep(keep, group.units, multiple_of, name)
        if keep is not None
        else _uniform(group.units, sparsity or 0.0, multiple_of)
        for name, group in groups.items()
    }


def check_budget(sparsity: float | None, keep: int | None, allocation: str, multiple_of: int) -> None:
    """Raise InputError unless the budget makes sense for some model."""
    if (sparsity is None) == (keep is None):
        raise InputError("give either sparsity (a fraction to remove) or keep (units left), not both or neither")
    if sparsity is not None and not 0 <= sparsity < 1:  # also refuses NaN
        raise InputError(f"sparsity {sparsity:g}: must be at least 0 and below 1 (0.75 removes three quarters)")
    if keep is not None and keep < 1:
        raise InputError(f"keep {keep}: must be at least 1")
    if multiple_of < 1:
        raise InputError(f"multiple-of {multiple_of}: must be at least 1")
    if allocation != "uniform":
        raise InputError(f"unknown allocation {allocation!r}; known: uniform")


def budget(sparsity: float | None, keep: int | None, allocation: str, multiple_of: int) -> dict[str, Any]:
    """The budget as a plan's `made_by` records it."""
    given = {"sparsity": sparsity} if keep is None else {"keep": keep}
    return {**given, "allocation": allocation, "multiple_of": multiple_of}


def select(importance: torch.Tensor, count: int) -> Selection:
    """Keep the `count` best units of every set; of equal units the first. importance: (groups, units)."""
    best = importance.argsort(dim=-1, descending=True, stable=True)[:, :count]
    keep = tuple(tuple(sorted(row)) for row in best.tolist())
    return Selection(importance.shape[1], keep)


def _uniform(units: int, sparsity: float, multiple_of: int) -> int:
    """The same fraction everywhere: the allowed count nearest to units * (1 - sparsity), at least one."""
    allowed = _multiples(units, multiple_of)
    target = units * (1 - sparsity)
    return min(allowed, key=lambda n: (abs(n - target), -n))


def _checked_keep(keep: int, units: int, multiple_of: int, name: str) -> int:
    if keep > units:
        raise InputError(f"keep {keep}: {name} has only {units} units")
    allowed = _multiples(units, multiple_of)
    if keep not in allowed:
        near = sorted(sorted(allowed, key=lambda n: abs(n - keep))[:2])
        raise InputError(f"keep {keep}: not a multiple of {multiple_of}; nearest: {' or '.join(map(str, near))}")
    return keep


def _multiples(units: int, multiple_of: int) -> list[int]:
    """The counts that a set of `units` may be cut to: multiples, and leaving it whole."""
    return sorted({*range(multiple_of, units + 1, multiple_of), units})
