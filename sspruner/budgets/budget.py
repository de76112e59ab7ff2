"""ResolvedBudget: how much to remove from which dependency group. Patterns that name layers."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Protocol, TypeVar

from sspruner.axes import GRANULARITIES
from sspruner.budgets.comparable import check_normalisation
from sspruner.budgets.elements import parse_pattern
from sspruner.errors import InputError
from sspruner.graph.group import DependencyGroup
from sspruner.plans.plan import axis_of

ALLOCATIONS = ("uniform", "global", "adaptive")

Value = TypeVar("Value", int, float)


class Fit(Protocol):
    """Rounds counts of units to those that a runtime takes (`sspruner.formats.targets.Fit`)."""

    def counts(self, counts: Mapping[str, int], options: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """Dependency group -> units that stay; options: the counts that everything else allows."""

    def changes(self, asked: Mapping[str, int], counts: Mapping[str, int]) -> list[str]:
        """What was rounded, in words."""

    def takes(self, axis: str) -> list[int]:
        """The sizes to which one axis alone may be cut in every layer."""

    def to_json(self) -> dict[str, Any]:
        """As a budget records it."""


@dataclass(frozen=True)
class ResolvedBudget:
    """How much to remove, and where: a recipe's budget, checked, with the sizes that a runtime takes.

    sparsity     fraction to remove, in [0, 1); or one for each axis
    keep         units left in every set, instead of sparsity
    allocation   how the budget is spread over layers: "uniform", every layer loses the fraction; "global", the units of
                 all layers compete by their scores (of all sets of a layer at the mean), and every layer keeps some;
                 "adaptive", the split of least damage by each layer's own, measured curve (sspruner.sensitivity)
    normalise    how scores are made comparable between layers for "global": "energy", "last" or "none"
                 (planning/comparable.py); None: as the scorer says
    floor, cap   pattern -> units that stay in every set of what it matches, at least and at most; later ones win
    multiple_of  keep a multiple of this many units (torch-pruning: round_to)
    ratios       pattern -> fraction to remove in the groups it matches; later ones win (pruning_ratio_dict)
    ignore       patterns of what is left alone (ignored_layers)
    pattern      on the axes of single elements, instead of sparsity: "2:4" keeps 2 of every 4 elements of a row
    granularity  there, where elements compete: "row", "tensor" or "global"; the scorer's own if None
    rows         there, the named runs of rows that compete, such as B and C; all if empty
    fit          rounds what all of that leads to, to sizes that a runtime takes

    A pattern is matched against a dependency group's name, its path, or the end of either from a dot on:
    `layers.0.*`, `*.mixer:head`. On the axes `block` and `mixer` it is matched against the modules, too.
    """

    sparsity: float | Mapping[str, float] | None = None
    keep: int | None = None
    allocation: str = "uniform"
    multiple_of: int = 1
    ratios: Mapping[str, float] = field(default_factory=dict)
    ignore: Sequence[str] = ()
    pattern: str | None = None
    granularity: str | None = None
    rows: Sequence[str] = ()
    normalise: str | None = None
    floor: Mapping[str, int] = field(default_factory=dict)
    cap: Mapping[str, int] = field(default_factory=dict)
    fit: Fit | None = None

    def __post_init__(self) -> None:
        """Raise InputError unless the budget makes sense for some model."""
        if self.pattern:
            n, m = parse_pattern(self.pattern)
            if isinstance(self.sparsity, float | int) and self.sparsity != 1 - n / m:
                raise InputError(f"pattern {self.pattern} removes {1 - n / m:g}, not {self.sparsity:g}; leave one out")
            if self.granularity:
                raise InputError(f"pattern {self.pattern} compares {m} elements; leave out granularity")
        if self.granularity not in (None, *GRANULARITIES):
            raise InputError(f"unknown granularity {self.granularity!r}; known: {', '.join(GRANULARITIES)}")
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
        if self.allocation not in ALLOCATIONS:
            raise InputError(f"unknown allocation {self.allocation!r}; known: {', '.join(ALLOCATIONS)}")
        if self.allocation != "uniform" and self.keep is not None:
            raise InputError(
                f"keep says how many units stay in every layer; allocation {self.allocation} wants a sparsity"
            )
        check_normalisation(self.normalise)
        if self.normalise and self.allocation != "global":
            raise InputError(
                f"normalise {self.normalise}: is for allocation global; {self.allocation} compares no scores"
            )
        for kind, bounds in (("floor", self.floor), ("cap", self.cap)):
            for pattern, units in bounds.items():
                if units < 1:
                    raise InputError(f"{kind} {pattern}={units}: must be at least 1")
            if bounds and self.keep is not None:
                raise InputError(f"keep says how many units stay in every layer; leave out {kind}")

    def to_json(self) -> dict[str, Any]:
        """The budget as a plan's `made_by` and a report record it: what was asked for, nothing that was not."""
        sparsity = dict(self.sparsity) if isinstance(self.sparsity, Mapping) else self.sparsity
        asked: dict[str, Any] = {"sparsity": sparsity} if self.keep is None else {"keep": self.keep}
        asked |= {"allocation": self.allocation, "multiple_of": self.multiple_of}
        asked |= {"ratios": dict(self.ratios)} if self.ratios else {}
        asked |= {"ignore": list(self.ignore)} if self.ignore else {}
        asked |= {"pattern": self.pattern} if self.pattern else {}
        asked |= {"granularity": self.granularity} if self.granularity else {}
        asked |= {"normalise": self.normalise} if self.normalise else {}
        asked |= {"floor": dict(self.floor)} if self.floor else {}
        asked |= {"cap": dict(self.cap)} if self.cap else {}
        asked |= {"target": self.fit.to_json()} if self.fit else {}
        return asked | ({"rows": list(self.rows)} if self.rows else {})

    def compares_layers(self, groups: Mapping[str, DependencyGroup], granularity: Mapping[str, str]) -> bool:
        """Whether all scores have to be known before anything is cut. granularity: of a scorer, by axis."""
        return self.allocation != "uniform" or any(
            self.granularity_of(g.axis, granularity) == "global" for g in groups.values() if g.tensor
        )

    def granularity_of(self, axis: str, granularity: Mapping[str, str]) -> str:
        """Where the elements of an axis compete."""
        return "pattern" if self.pattern else self.granularity or granularity.get(axis, "tensor")


def pattern_sparsity(pattern: str) -> float:
    """The fraction that a pattern removes."""
    n, m = parse_pattern(pattern)
    return 1 - n / m


def check_patterns(names: Sequence[str], patterns: Sequence[str]) -> None:
    """Raise InputError for a pattern that matches none of `names`."""
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            short = {re.sub(r"^.*?(?=\blayers\.)", "", name) for name in names}
            near = difflib.get_close_matches(pattern, sorted(short), n=1, cutoff=0) or [""]
            raise InputError(f"pattern {pattern!r}: matches nothing that is cut; the nearest name is {near[0]}")


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern of `ResolvedBudget` means the dependency group or module `name`."""
    path, _, axis = name.partition(":")
    forms = [name, path] if axis else [path, f"{path}."]
    return any(fnmatchcase(form, p) for form in forms for p in (pattern, f"*.{pattern}"))


def protected(group: DependencyGroup, ignore: Sequence[str]) -> list[int]:
    """The units of an axis of whole modules that the patterns leave alone."""
    return [unit for unit, block in enumerate(group.blocks) if ignored(block.path, ignore)]


def ignored(name: str, ignore: Sequence[str]) -> bool:
    """Whether one of the patterns means `name`."""
    return any(matches(pattern, name) for pattern in ignore)


def ratio_of(name: str, budget: ResolvedBudget) -> float:
    """The fraction to remove from one group: that of its axis, or of the last pattern that matches it."""
    sparsity = budget.sparsity
    ratio = sparsity.get(axis_of(name), 0.0) if isinstance(sparsity, Mapping) else sparsity or 0.0
    return _last_match(name, budget.ratios, ratio)


def bounds_of(name: str, units: int, step: int, budget: ResolvedBudget) -> tuple[int, int]:
    """The least and the most units that a group may keep, in steps that it allows. Raises InputError if there is none.

    A floor is rounded up to a step and a cap down; the whole group is always a step. Without a floor the least is 0.
    """
    floor, cap = _last_match(name, budget.floor, 0), _last_match(name, budget.cap, units)
    if floor > units:
        raise InputError(f"floor {floor}: {name} has only {units} units")
    least = min(math.ceil(floor / step) * step, units)
    most = units if cap >= units else cap // step * step
    smallest = max(least, min(step, units))
    if most < smallest:
        raise InputError(
            f"{name}: no size between floor {max(floor, 1)} and cap {min(cap, units)} in multiples of {step}; "
            f"the nearest are {max(most, min(step, units))} and {smallest}"
        )
    return least, most


def _last_match(name: str, by_pattern: Mapping[str, Value], otherwise: Value) -> Value:
    return next((value for pattern, value in reversed(list(by_pattern.items())) if matches(pattern, name)), otherwise)
