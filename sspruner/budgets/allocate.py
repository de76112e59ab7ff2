"""Allocation: from a budget, and from scores where layers compete, to a count per dependency group."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from sspruner.budgets.budget import ResolvedBudget, bounds_of, check_patterns, ignored, matches, protected, ratio_of
from sspruner.budgets.split import Curve, best_split, damage_at
from sspruner.errors import InputError
from sspruner.graph.group import DependencyGroup

EVEN = 1e-9  # nats, penalty of a layer that loses everything: prefers the most even of equally good splits


def allocate(
    groups: Mapping[str, DependencyGroup],
    budget: ResolvedBudget,
    importance: Mapping[str, torch.Tensor] | None = None,
    curves: Mapping[str, Curve] | None = None,
) -> dict[str, int]:
    """Return the units to keep in every set of each dependency group, without the axes of single elements.

    importance  all scores, comparable between layers, for the allocation "global"
    curves      damage of cutting each layer alone, for "adaptive"

    Raises InputError for a pattern that matches nothing, and for a budget that a group cannot meet; the message has the
    nearest that it can meet.
    """
    axes = {group.axis for group in groups.values()}
    for axis in budget.sparsity if isinstance(budget.sparsity, Mapping) else ():
        if axis not in axes:
            raise InputError(f"axis {axis!r}: was not scored; there are scores for {', '.join(sorted(axes))}")
    check_patterns(list(groups), list(budget.ratios))
    check_patterns([n for name, g in groups.items() for n in (name, *(b.path for b in g.blocks))], budget.ignore)
    units = {name: group for name, group in groups.items() if not group.tensor}
    if budget.keep is not None and len(units) < len(groups):
        raise InputError("keep counts units; of single elements give the fraction to remove, sparsity, or a pattern")
    if not units and (budget.floor or budget.cap):
        raise InputError("floor and cap count units; on the axes of single elements give ratios instead")
    check_patterns(list(units), [*budget.floor, *budget.cap])
    if budget.allocation == "adaptive" and not any(_has_layers(group) for group in units.values()):
        raise InputError("allocation adaptive: wants an axis with a group of units in each layer; use uniform")
    competing = {n: g for n, g in units.items() if budget.allocation != "uniform" and _competes(n, g, budget)}
    if budget.allocation == "adaptive":
        counts = _adaptive_counts(competing, budget, curves)
    else:
        counts = _global_counts(competing, budget, importance)
    for name, group in units.items():
        guarded, step = len(protected(group, budget.ignore)), math.lcm(budget.multiple_of, group.multiple_of)
        if name in counts:
            continue
        if ignored(name, budget.ignore) or guarded == group.units:
            counts[name] = group.units
        elif budget.keep is not None:
            counts[name] = _checked_keep(budget.keep, group, step)
        else:
            counts[name] = _uniform(group, ratio_of(name, budget), step, bounds_of(name, group.units, step, budget))
        if counts[name] < guarded:
            raise InputError(f"{name}: keeping {counts[name]} units is less than the {guarded} that --ignore protects")
    return budget.fit.counts(counts, {n: _options(g, budget) for n, g in units.items()}) if budget.fit else counts


def _competes(name: str, group: DependencyGroup, budget: ResolvedBudget) -> bool:
    """Return whether a group takes part in a global allocation.

    No pattern may name it, and its axis must have one group per layer.
    """
    alone = any(matches(pattern, name) for pattern in (*budget.ratios, *budget.ignore))
    return not alone and _has_layers(group) and ratio_of(name, budget) > 0


def _has_layers(group: DependencyGroup) -> bool:
    """Return whether a group belongs to one layer, unlike the groups of the whole model."""
    return not group.blocks and group.axis != "hidden"


def _global_counts(
    groups: Mapping[str, DependencyGroup], budget: ResolvedBudget, importance: Mapping[str, torch.Tensor] | None
) -> dict[str, int]:
    """Return the counts that keep, on every axis, the best units of all layers, as near to the budget as steps allow.

    A layer's sets keep equal counts: its r-th best unit stands for the r-th best of every set, with their mean score.
    Ranks are kept in steps of the multiple, with the mean score of a step; every layer keeps its first step, or its
    floor.
    """
    counts: dict[str, int] = {}
    for on_axis in _by_axis(groups):
        if importance is None:
            raise InputError("allocation global compares all layers: their scores have to be known before any is cut")
        steps = [_steps(g, importance[g.name], budget) for g in on_axis]
        owner = torch.cat([torch.full((len(sizes),), i) for i, (_, sizes) in enumerate(steps)])
        worth, size = (torch.cat(parts) for parts in zip(*steps, strict=True))
        order = worth.argsort(descending=True, stable=True)  # steps that must stay come first, with infinite worth
        required = int(worth.isposinf().sum())
        sets = torch.tensor([g.groups for g in on_axis])[owner]
        total = (size * sets)[order].cumsum(0)[required - 1 :]  # units kept with 0, 1, 2, ... more steps
        distance = (total - _target(on_axis, budget)).abs()
        more = len(distance) - 1 - int(distance.flip(0).argmin())  # of two equally near the larger
        chosen = order[: required + more]
        for i, g in enumerate(on_axis):
            counts[g.name] = int(size[chosen[owner[chosen] == i]].sum())
    return counts


def _adaptive_counts(
    groups: Mapping[str, DependencyGroup], budget: ResolvedBudget, curves: Mapping[str, Curve] | None
) -> dict[str, int]:
    """Return the counts with the least total damage within the budget, on every axis; of equal ones the most even.

    To prefer even splits, each layer costs EVEN times its squared lost fraction on top, far below what is measured.
    """
    counts: dict[str, int] = {}
    for on_axis in _by_axis(groups):
        missing = [g.name for g in on_axis if curves is None or g.name not in curves]
        if curves is None or missing:
            raise InputError(
                f"allocation adaptive: what cutting {missing[0]} costs was not measured; "
                "sspruner.sensitivity measures it, and so does `sspruner prune`"
            )
        options = {g.name: _options(g, budget) for g in on_axis}
        costs = {
            g.name: damage_at(curves[g.name], options[g.name], g.units) + EVEN * _lost(options[g.name], g.units) ** 2
            for g in on_axis
        }
        counts |= best_split(options, costs, {g.name: g.groups for g in on_axis}, _target(on_axis, budget))
    return counts


def _lost(kept: list[int], units: int) -> torch.Tensor:
    """Return the removed fractions of a layer: fp64 (len(kept),)."""
    return 1 - torch.tensor(kept, dtype=torch.float64) / units


def _by_axis(groups: Mapping[str, DependencyGroup]) -> list[list[DependencyGroup]]:
    axes = dict.fromkeys(group.axis for group in groups.values())
    return [[group for group in groups.values() if group.axis == axis] for axis in axes]


def _target(groups: list[DependencyGroup], budget: ResolvedBudget) -> float:
    """Return the number of units of all layers that the budget keeps."""
    return sum(g.groups * g.units * (1 - ratio_of(g.name, budget)) for g in groups)


def _options(group: DependencyGroup, budget: ResolvedBudget) -> list[int]:
    """Return the sizes that a group may have."""
    step = math.lcm(budget.multiple_of, group.multiple_of)
    least, most = bounds_of(group.name, group.units, step, budget)
    return sorted({*(n for n in group.counts(step, least) if n <= most), most})


def _steps(
    group: DependencyGroup, importance: torch.Tensor, budget: ResolvedBudget
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the worth of each step of a group's ranks, best first, and its size: (steps,) twice.

    The last step may be shorter.

    Steps up to the floor, and always the first, have infinite worth; those beyond the cap are left out.
    """
    step = math.lcm(budget.multiple_of, group.multiple_of)
    least, most = bounds_of(group.name, group.units, step, budget)
    ranked = importance.double().sort(descending=True).values.mean(0)  # (units,)
    sizes = torch.full((math.ceil(group.units / step),), step)
    padded = F.pad(ranked, (0, missing := len(sizes) * step - group.units))
    sizes[-1] -= missing
    worth = (padded.view(len(sizes), step).sum(-1) / sizes).cummin(0).values  # removes increases by rounding
    worth[: math.ceil(max(least, group.least, 1) / step)] = torch.inf
    within = math.ceil(most / step)
    return worth[:within], sizes[:within]


def _uniform(group: DependencyGroup, sparsity: float, multiple_of: int, bounds: tuple[int, int]) -> int:
    """Return the allowed count nearest to units * (1 - sparsity), clamped to the bounds; of two the larger.

    Raises InputError for a ratio that would remove nothing or everything by rounding, with the nearest that can be met,
    unless a floor or a cap decides.
    """
    least, most = bounds
    if sparsity == 0:
        return most
    allowed = list(range(multiple_of, group.units + 1, multiple_of))
    target = group.units * (1 - sparsity)
    nearest = min([0, *allowed, group.units], key=lambda n: (abs(n - target), -n))
    bounded = min(max(nearest, least), most)
    if bounded >= min(group.least, group.units) and (0 < nearest < group.units or 0 < bounded != nearest):
        return bounded
    feasible = sorted(group.counts(multiple_of), key=lambda n: (abs(n - target), -n))
    sets = f"{group.groups} sets of {group.units} units" if group.groups > 1 else f"{group.units} units"
    steps = f" in multiples of {multiple_of}" if multiple_of > 1 else ""
    advice = (
        f"the nearest that can be met is {1 - feasible[0] / group.units:.4g} (keeps {feasible[0]})"
        if feasible
        else "it cannot be cut; leave it out with ignore"
    )
    does = "removes nothing from" if nearest else "removes everything from"
    if 0 < nearest < group.units:
        does, steps = f"keeps {nearest} of", f", and {group.least} have to stay ({group.why_least})"
    raise InputError(f"{group.name}: {sparsity:g} {does} {sets}{steps}; {advice}")


def _checked_keep(keep: int, group: DependencyGroup, multiple_of: int) -> int:
    if keep > group.units:
        raise InputError(f"keep {keep}: {group.name} has only {group.units} units")
    allowed = [*group.counts(multiple_of), group.units]
    if keep not in allowed:
        near, why = sorted(sorted(allowed, key=lambda n: abs(n - keep))[:2]), f"not a multiple of {multiple_of}"
        if keep < group.least:
            near, why = allowed[:1], f"{group.name} needs {group.least} or more ({group.why_least})"
        raise InputError(f"keep {keep}: {why}; nearest: {' or '.join(map(str, near))}")
    return keep
