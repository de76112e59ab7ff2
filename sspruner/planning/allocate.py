"""Allocation: from a budget, and from scores where layers compete, to a count per dependency group."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from sspruner.errors import InputError
from sspruner.graph.group import DependencyGroup
from sspruner.planning.budget import Budget, check_patterns, ignored, matches, protected, ratio_of


def allocate(
    groups: Mapping[str, DependencyGroup], budget: Budget, importance: Mapping[str, torch.Tensor] | None = None
) -> dict[str, int]:
    """Units to keep in every set of each dependency group, the axes of single elements left out.

    importance: all scores, for the allocation "global". Raises InputError for a pattern that matches nothing, and for
    a budget that a group cannot meet: it names the nearest that it can.
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
    competing = [n for n, g in units.items() if budget.allocation == "global" and _competes(n, g, budget)]
    counts = _global_counts({n: units[n] for n in competing}, budget, importance)
    for name, group in units.items():
        guarded, step = len(protected(group, budget.ignore)), math.lcm(budget.multiple_of, group.multiple_of)
        if name in counts:
            continue
        if ignored(name, budget.ignore) or guarded == group.units:
            counts[name] = group.units
        elif budget.keep is not None:
            counts[name] = _checked_keep(budget.keep, group.units, step, name)
        else:
            counts[name] = _uniform(group, ratio_of(name, budget), step)
        if counts[name] < guarded:
            raise InputError(f"{name}: keeping {counts[name]} units is less than the {guarded} that --ignore protects")
    return counts


def _competes(name: str, group: DependencyGroup, budget: Budget) -> bool:
    """Whether a group takes part in a global allocation: nothing was said of it alone, and it is not the only one."""
    alone = any(matches(pattern, name) for pattern in (*budget.ratios, *budget.ignore))
    return not alone and not group.blocks and group.axis != "hidden" and ratio_of(name, budget) > 0


def _global_counts(
    groups: Mapping[str, DependencyGroup], budget: Budget, importance: Mapping[str, torch.Tensor] | None
) -> dict[str, int]:
    """The counts that keep, on every axis, the best units of all layers, as near to the budget as steps allow.

    A layer's sets keep equal counts: its r-th best unit stands for the r-th best of every set, at their mean. Ranks
    stay or go in steps of the multiple, at the mean of a step, and every layer keeps its first step.
    """
    counts: dict[str, int] = {}
    for axis in dict.fromkeys(group.axis for group in groups.values()):
        on_axis = [g for g in groups.values() if g.axis == axis]
        if importance is None:
            raise InputError("allocation global compares all layers: their scores have to be known before any is cut")
        steps = [_steps(g, importance[g.name], math.lcm(budget.multiple_of, g.multiple_of)) for g in on_axis]
        owner = torch.cat([torch.full((len(sizes),), i) for i, (_, sizes) in enumerate(steps)])
        worth, size = (torch.cat(parts) for parts in zip(*steps, strict=True))
        order = worth.argsort(descending=True, stable=True)  # the first steps, which are worth most, before all others
        sets = torch.tensor([g.groups for g in on_axis])[owner]
        total = (size * sets)[order].cumsum(0)[len(on_axis) - 1 :]  # units that stay, with so many more steps
        away = (total - sum(g.groups * g.units * (1 - ratio_of(g.name, budget)) for g in on_axis)).abs()
        more = len(away) - 1 - int(away.flip(0).argmin())  # of two as near the larger
        chosen = order[: len(on_axis) + more]
        for i, g in enumerate(on_axis):
            counts[g.name] = int(size[chosen[owner[chosen] == i]].sum())
    return counts


def _steps(group: DependencyGroup, importance: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What each step of a group's ranks is worth, best first, and its size: (steps,) twice. The last may be shorter."""
    ranked = importance.double().sort(descending=True).values.mean(0)  # (units,)
    sizes = torch.full((math.ceil(group.units / step),), step)
    padded = F.pad(ranked, (0, missing := len(sizes) * step - group.units))
    sizes[-1] -= missing
    worth = (padded.view(len(sizes), step).sum(-1) / sizes).cummin(0).values  # never more by a rounding
    worth[0] = torch.inf
    return worth, sizes


def _uniform(group: DependencyGroup, sparsity: float, multiple_of: int) -> int:
    """The allowed count nearest to units * (1 - sparsity); of two as near the larger.

    A ratio that would remove nothing or everything by rounding is refused, with the nearest that can be met.
    """
    if sparsity == 0:
        return group.units
    allowed = list(range(multiple_of, group.units + 1, multiple_of))
    target = group.units * (1 - sparsity)
    nearest = min([0, *allowed, group.units], key=lambda n: (abs(n - target), -n))
    if 0 < nearest < group.units:
        return nearest
    can = sorted((n for n in allowed if n < group.units), key=lambda n: (abs(n - target), -n))
    sets = f"{group.groups} sets of {group.units} units" if group.groups > 1 else f"{group.units} units"
    steps = f" in multiples of {multiple_of}" if multiple_of > 1 else ""
    advice = (
        f"the nearest that can be met is {1 - can[0] / group.units:.4g} (keeps {can[0]})"
        if can
        else "it cannot be cut; leave it out with ignore"
    )
    does = "removes nothing from" if nearest else "removes everything from"
    raise InputError(f"{group.name}: {sparsity:g} {does} {sets}{steps}; {advice}")


def _checked_keep(keep: int, units: int, multiple_of: int, name: str) -> int:
    if keep > units:
        raise InputError(f"keep {keep}: {name} has only {units} units")
    allowed = sorted({*range(multiple_of, units + 1, multiple_of), units})
    if keep not in allowed:
        near = sorted(sorted(allowed, key=lambda n: abs(n - keep))[:2])
        raise InputError(f"keep {keep}: not a multiple of {multiple_of}; nearest: {' or '.join(map(str, near))}")
    return keep
