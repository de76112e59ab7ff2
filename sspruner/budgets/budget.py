"""ResolvedBudget: how much to remove from which dependency group, and patterns that name layers."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from sspruner.axes import GRANULARITIES, axis_of
from sspruner.errors import InputError

if TYPE_CHECKING:  # torch is not needed to check a budget
    from sspruner.benchmarking.engine_limit import EngineLimit
    from sspruner.graph.group import DependencyGroup

ALLOCATIONS = ("uniform", "global", "adaptive")
NORMALISATIONS = ("none", "energy", "last")

Value = TypeVar("Value", int, float)


class Fit(Protocol):
    """Protocol: rounds counts of units to those that a runtime supports (`sspruner.formats.targets.Fit`)."""

    def counts(self, counts: Mapping[str, int], options: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """Return dependency group -> units to keep. options: the counts that all other settings allow."""

    def changes(self, asked: Mapping[str, int], counts: Mapping[str, int]) -> list[str]:
        """Describe what was rounded."""

    def takes(self, axis: str) -> list[int]:
        """Return the supported sizes of one axis if only this axis is cut, equally in every layer."""

    def to_json(self) -> dict[str, Any]:
        """Return what a budget records."""


@dataclass(frozen=True)
class ResolvedBudget:
    """Checked budget of a recipe: how much to remove, and where, with the sizes that a runtime supports.

    sparsity     fraction to remove, in [0, 1); or one for each axis
    keep         units kept in every set, instead of sparsity
    allocation   how the budget is distributed over layers: "uniform", each layer loses the fraction; "global", the
                 units of all layers compete by their scores (averaged over the sets of a layer), and every layer keeps
                 some; "adaptive", the split of least damage by each layer's measured curve (sspruner.sensitivity)
    normalise    how scores are made comparable between layers for "global": "energy", "last" or "none"
                 (budgets/comparable.py); None: as the scorer declares
    floor, cap   pattern -> minimal and maximal number of units kept per set in matching groups; the last match wins
    multiple_of  keep a multiple of this many units (torch-pruning: round_to)
    ratios       pattern -> fraction to remove in matching groups; the last match wins (pruning_ratio_dict)
    ignore       patterns of groups that are not cut (ignored_layers)
    pattern      on the axes of single elements, instead of sparsity: "2:4" keeps 2 of every 4 elements of a row
    granularity  on these axes, the scope within which elements compete: "row", "tensor" or "global"; None: the scorer's
    rows         on these axes, the named runs of rows that compete, such as B and C; all if empty
    fit          rounds the result to sizes that a runtime supports
    engine       counts the sequences of a limit as the target's engine does

    A pattern is matched against a dependency group's name, its path, or the end of either after a dot: `layers.0.*`,
    `*.mixer:head`. On the axes `block` and `mixer` it is matched against the modules, too.
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
    engine: EngineLimit | None = None

    def __post_init__(self) -> None:
        """Raise InputError if the budget is invalid for every model."""
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
        """Return the budget as a plan's `made_by` and a report record it, without unset fields."""
        sparsity = dict(self.sparsity) if isinstance(self.sparsity, Mapping) else self.sparsity
        fields: dict[str, Any] = {"sparsity": sparsity} if self.keep is None else {"keep": self.keep}
        fields |= {"allocation": self.allocation, "multiple_of": self.multiple_of}
        fields |= {"ratios": dict(self.ratios)} if self.ratios else {}
        fields |= {"ignore": list(self.ignore)} if self.ignore else {}
        fields |= {"pattern": self.pattern} if self.pattern else {}
        fields |= {"granularity": self.granularity} if self.granularity else {}
        fields |= {"normalise": self.normalise} if self.normalise else {}
        fields |= {"floor": dict(self.floor)} if self.floor else {}
        fields |= {"cap": dict(self.cap)} if self.cap else {}
        fields |= {"target": self.fit.to_json()} if self.fit else {}
        return fields | ({"rows": list(self.rows)} if self.rows else {})

    def compares_layers(self, groups: Mapping[str, DependencyGroup], granularity: Mapping[str, str]) -> bool:
        """Return whether all scores must be known before anything is cut. granularity: the scorers' own, by axis."""
        return self.allocation != "uniform" or any(
            self.granularity_of(g.axis, granularity) == "global" for g in groups.values() if g.tensor
        )

    def granularity_of(self, axis: str, granularity: Mapping[str, str]) -> str:
        """Return the scope within which the elements of an axis compete."""
        return "pattern" if self.pattern else self.granularity or granularity.get(axis, "tensor")


def pattern_sparsity(pattern: str) -> float:
    """Return the fraction that a pattern removes."""
    n, m = parse_pattern(pattern)
    return 1 - n / m


def check_patterns(names: Sequence[str], patterns: Sequence[str]) -> None:
    """Raise InputError for a pattern that matches none of `names`."""
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            short = {re.sub(r"^.*?(?=\blayers\.)", "", name) for name in names}
            near = difflib.get_close_matches(pattern, sorted(short), n=1, cutoff=0) or [""]
            raise InputError(f"pattern {pattern!r}: matches nothing that is cut; the nearest name is {near[0]}")


def parse_pattern(pattern: str) -> tuple[int, int]:
    """Parse `2:4` as (2, 4): keep 2 of every 4 consecutive elements of a row. Raises InputError for anything else."""
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    n, m = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 < n < m:
        raise InputError(f"pattern {pattern!r}: expected N:M with 0 < N < M; 2:4 keeps 2 of every 4 weights of a row")
    return n, m


def check_normalisation(how: str | None) -> None:
    """Raise InputError for an unknown normalisation."""
    if how not in (None, *NORMALISATIONS):
        raise InputError(f"unknown normalisation {how!r}; known: {', '.join(NORMALISATIONS)}")


def matches(pattern: str, name: str) -> bool:
    """Return whether a pattern of `ResolvedBudget` matches the dependency group or module `name`."""
    path, _, axis = name.partition(":")
    forms = [name, path] if axis else [path, f"{path}."]
    return any(fnmatchcase(form, p) for form in forms for p in (pattern, f"*.{pattern}"))


def protected(group: DependencyGroup, ignore: Sequence[str]) -> list[int]:
    """Return the units of an axis of whole modules that the patterns protect."""
    return [unit for unit, block in enumerate(group.blocks) if ignored(block.path, ignore)]


def ignored(name: str, ignore: Sequence[str]) -> bool:
    """Return whether one of the patterns matches `name`."""
    return any(matches(pattern, name) for pattern in ignore)


def ratio_of(name: str, budget: ResolvedBudget) -> float:
    """Return the fraction to remove from one group: that of its axis, or of the last pattern that matches it."""
    sparsity = budget.sparsity
    ratio = sparsity.get(axis_of(name), 0.0) if isinstance(sparsity, Mapping) else sparsity or 0.0
    return _last_match(name, budget.ratios, ratio)


def bounds_of(name: str, units: int, step: int, budget: ResolvedBudget) -> tuple[int, int]:
    """Return the minimal and maximal number of units that a group may keep. Raises InputError if there is none.

    A floor is rounded up to a step and a cap down; the whole group is always a step. Without a floor the minimum is 0.
    What the model's code needs at least (`DependencyGroup.least`) is not part of it.
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
