"""Allocation: from scores and a budget to a count per dependency group, and from counts to a plan."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch

from sspruner.errors import InputError, PlanError
from sspruner.graph.group import DependencyGroup
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.planning.plan import Plan, Selection, axis_of
from sspruner.planning.scores import Scores


@dataclass(frozen=True)
class Budget:
    """How much to remove, and where.

    sparsity     fraction to remove, in [0, 1); or one for each axis
    keep         units left in every set, instead of sparsity
    allocation   how the budget is spread over layers: uniform
    multiple_of  keep a multiple of this many units (torch-pruning: round_to)
    ratios       pattern -> fraction to remove in the groups it matches; later ones win (pruning_ratio_dict)
    ignore       patterns of what is left alone (ignored_layers)

    A pattern is matched against a dependency group's name, its path, or the end of either from a dot on:
    `layers.0.*`, `*.mixer:head`. On the axes `block` and `mixer` it is matched against the modules, too.
    """

    sparsity: float | Mapping[str, float] | None = None
    keep: int | None = None
    allocation: str = "uniform"
    multiple_of: int = 1
    ratios: Mapping[str, float] = field(default_factory=dict)
    ignore: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Raise InputError unless the budget makes sense for some model."""
        if (self.sparsity is None) == (self.keep is None):
            raise InputError("give either sparsity (a fraction to remove) or keep (units left), not both or neither")
        by_axis = self.sparsity if isinstance(self.sparsity, Mapping) else {"sparsity": self.sparsity}
        for name, value in {**by_axis, **self.ratios}.items():
            if value is not None and not 0 <= value < 1:  # also refuses NaN
                label = name if name == "sparsity" else f"{name}: sparsity"
                raise InputError(f"{label} {value:g}: must be at least 0 and below 1 (0.75 removes three quarters)")
        if self.keep is not None and self.keep < 1:
            raise InputError(f"keep {self.keep}: must be at least 1")
        if self.multiple_of < 1:
            raise InputError(f"multiple-of {self.multiple_of}: must be at least 1")
        if self.allocation != "uniform":
            raise InputError(f"unknown allocation {self.allocation!r}; known: uniform")

    def to_json(self) -> dict[str, Any]:
        """The budget as a plan's `made_by` and a report record it: what was asked for, nothing that was not."""
        sparsity = dict(self.sparsity) if isinstance(self.sparsity, Mapping) else self.sparsity
        asked: dict[str, Any] = {"sparsity": sparsity} if self.keep is None else {"keep": self.keep}
        asked |= {"allocation": self.allocation, "multiple_of": self.multiple_of}
        asked |= {"ratios": dict(self.ratios)} if self.ratios else {}
        return asked | ({"ignore": list(self.ignore)} if self.ignore else {})


def plan(
    graph: SSMGraph,
    scores: Scores,
    *,
    sparsity: float | Mapping[str, float] | None = None,
    keep: int | None = None,
    allocation: str = "uniform",
    multiple_of: int = 1,
    ratios: Mapping[str, float] | None = None,
    ignore: Sequence[str] = (),
) -> Plan:
    """Keep the highest-scored units of every dependency group in `scores`, on one axis or on several.

    The arguments are those of `Budget`: what to remove (`sparsity`, a fraction or one per axis, or `keep`), and where
    (`ratios`, `ignore`). Raises InputError for an impossible budget, PlanError if the scores do not fit the graph.
    """
    return make_plan(graph, scores, Budget(sparsity, keep, allocation, multiple_of, ratios or {}, ignore))


def make_plan(graph: SSMGraph, scores: Scores, budget: Budget) -> Plan:
    """`plan`, from a Budget."""
    for name, importance in scores.importance.items():
        group = graph.groups.get(name)
        if group is None or tuple(importance.shape) != (group.groups, group.units):
            raise PlanError(f"{name}: scores of shape {tuple(importance.shape)} do not fit this model; score it again")
    groups = {name: group for name, group in graph.groups.items() if name in scores.importance}
    counts = allocate(groups, budget)
    selections = {
        name: select(scores.importance[name], counts[name], protected(group, budget.ignore))
        for name, group in groups.items()
        if counts[name] < group.units
    }
    if not selections:
        raise InputError("the budget removes nothing: every dependency group keeps all its units")
    made_by = {**scores.metadata, **budget.to_json()}
    return Plan(selections, {"fingerprint": scores.metadata.get("model", "")}, made_by)


def allocate(groups: Mapping[str, DependencyGroup], budget: Budget) -> dict[str, int]:
    """Units to keep in every set of each dependency group.

    Raises InputError for a pattern that matches nothing, and for a budget that a group cannot meet: it names the
    nearest that it can.
    """
    axes = {group.axis for group in groups.values()}
    for axis in budget.sparsity if isinstance(budget.sparsity, Mapping) else ():
        if axis not in axes:
            raise InputError(f"axis {axis!r}: was not scored; there are scores for {', '.join(sorted(axes))}")
    check_patterns(list(groups), list(budget.ratios))
    check_patterns([n for name, g in groups.items() for n in (name, *(b.path for b in g.blocks))], budget.ignore)
    counts = {}
    for name, group in groups.items():
        guarded, step = len(protected(group, budget.ignore)), math.lcm(budget.multiple_of, group.multiple_of)
        if _ignored(name, budget.ignore) or guarded == group.units:
            counts[name] = group.units
        elif budget.keep is not None:
            counts[name] = _checked_keep(budget.keep, group.units, step, name)
        else:
            counts[name] = _uniform(group, _ratio(name, budget), step)
        if counts[name] < guarded:
            raise InputError(f"{name}: keeping {counts[name]} units is less than the {guarded} that --ignore protects")
    return counts


def check_patterns(names: Sequence[str], patterns: Sequence[str]) -> None:
    """Raise InputError for a pattern that matches none of `names`."""
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            short = {re.sub(r"^.*?(?=\blayers\.)", "", name) for name in names}
            near = difflib.get_close_matches(pattern, sorted(short), n=1, cutoff=0) or [""]
            raise InputError(f"pattern {pattern!r}: matches nothing that is cut; the nearest name is {near[0]}")


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern of `Budget` means the dependency group or module `name`."""
    path, _, axis = name.partition(":")
    forms = [name, path] if axis else [path, f"{path}."]
    return any(fnmatchcase(form, p) for form in forms for p in (pattern, f"*.{pattern}"))


def protected(group: DependencyGroup, ignore: Sequence[str]) -> list[int]:
    """The units of an axis of whole modules that the patterns leave alone."""
    return [unit for unit, block in enumerate(group.blocks) if _ignored(block.path, ignore)]


def select(importance: torch.Tensor, count: int, protected: Sequence[int] = ()) -> Selection:
    """Keep the `count` best units of every set; of equal units the first. importance: (groups, units)."""
    importance = importance.clone()
    importance[:, list(protected)] = torch.inf
    best = importance.argsort(dim=-1, descending=True, stable=True)[:, :count]
    keep = tuple(tuple(sorted(row)) for row in best.tolist())
    return Selection(importance.shape[1], keep)


def _ignored(name: str, ignore: Sequence[str]) -> bool:
    return any(matches(pattern, name) for pattern in ignore)


def _ratio(name: str, budget: Budget) -> float:
    """The fraction to remove from one group: that of its axis, or of the last pattern that matches it."""
    sparsity = budget.sparsity
    ratio = sparsity.get(axis_of(name), 0.0) if isinstance(sparsity, Mapping) else sparsity or 0.0
    for pattern, value in budget.ratios.items():
        if matches(pattern, name):
            ratio = value
    return ratio


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
