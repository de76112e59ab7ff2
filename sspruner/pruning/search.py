"""Search: the scorer that costs least at a cut, and the cut that meets limits in users' units.

All on scores that are made once. A cut is measured under its mask, on calibration text; what is reported in the end is
measured on held-out text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from sspruner.budgets.budget import Fit, ResolvedBudget
from sspruner.budgets.decide import plan_within
from sspruner.budgets.split import Curve
from sspruner.calibrate.sources import Calibration, Progress
from sspruner.errors import InputError, PlanError
from sspruner.evaluation.damage import Damage, damages
from sspruner.graph.group import DependencyGroup
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.plans.plan import Plan, axis_of, check_plan
from sspruner.pruning.sensitivity import damage_curves
from sspruner.recipes.parts import Limits
from sspruner.scoring.scores import Scores
from sspruner.surgery.sizes import Sizes, sizes

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]
Make = Callable[[float], Plan]  # fraction to remove -> plan; raises InputError for one that cannot be met


@dataclass(frozen=True)
class Point:
    """One cut that was looked at. perplexity, kl: on calibration text, None where only its size mattered."""

    sparsity: float
    parameters: int
    state_bytes: int
    perplexity: float | None = None
    kl: float | None = None


@dataclass(frozen=True)
class Found:
    """The fraction to remove that meets the limits, and the cuts that were looked at, mildest first."""

    sparsity: float
    curve: tuple[Point, ...]

    def to_json(self) -> list[dict[str, Any]]:
        """The curve as a report holds it."""
        return [asdict(point) for point in self.curve]


def fractions(groups: Mapping[str, DependencyGroup], multiple_of: int, fit: Fit | None = None) -> list[float]:
    """The fractions to remove that lead to different sizes, mildest first: those of the largest group's steps.

    fit: of those only what a runtime takes.
    """
    units = max(group.units for group in groups.values())
    if fit:
        return [1 - kept / units for kept in reversed(fit.takes(next(iter(groups.values())).axis))]
    step = math.lcm(multiple_of, *(group.multiple_of for group in groups.values()))
    return [1 - kept / units for kept in reversed(range(step, units, step))]


def meet(
    model: nn.Module,
    graph: SSMGraph,
    make: Make,
    candidates: Sequence[float],
    limits: Limits,
    batches: Batches = (),
    progress: Progress | None = None,
) -> Found:
    """The cut that meets limits: of size, the mildest that fits; of damage alone, the largest that stays within.

    Both are found by bisection over `candidates` (fractions, mildest first): sizes fall and damage rises along them.
    Damage may do so unevenly: what is returned has been measured and is within its limit. Raises InputError where no
    cut meets the limits, with what the nearest would take or cost.
    """
    able = [s for s in candidates if _possible(model, graph, make, s)]
    if not able:
        raise InputError("limits: no size of this axis can be cut to")
    dense, batches = sizes(model, graph), list(batches)
    seen: dict[int, Point] = {}

    @cache
    def size(i: int) -> Sizes:
        found = sizes(model, graph, make(able[i]))
        seen[i] = Point(able[i], found.parameters, found.state_bytes)
        return found

    @cache
    def cost(i: int) -> Damage:
        if progress:
            progress(f"measuring {able[i]:.0%}", len(seen), len(able))
        (found,) = damages(model, [make(able[i])], graph, batches)
        taken = size(i)
        seen[i] = Point(able[i], taken.parameters, taken.state_bytes, found.pruned_perplexity, found.kl)
        return found

    if limits.of_size:
        if not dense.exceeds(limits, dense):
            raise InputError("limits: the dense model is within them; nothing has to be removed")
        if why := size(len(able) - 1).exceeds(limits, dense):
            raise InputError(f"{why} even with {able[-1]:.1%} of the axis removed; cut another axis, too")
        chosen = _first(lambda i: not size(i).exceeds(limits, dense), len(able))
        if limits.of_damage and (why := _too_much(cost(chosen), limits)):
            raise InputError(f"the mildest cut that fits removes {able[chosen]:.1%}, and {why}")
    else:
        chosen = _first(lambda i: bool(_too_much(cost(i), limits)), len(able)) - 1
        if chosen < 0:
            raise InputError(f"even the mildest cut, {able[0]:.1%}: {_too_much(cost(0), limits)}")
    return Found(able[chosen], tuple(seen[i] for i in sorted(seen)))


def _first(holds: Callable[[int], bool], count: int) -> int:
    """The first of `count` numbers from which on a condition holds, `count` if it never does: by bisection."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _too_much(cost: Damage, limits: Limits) -> str:
    """What a cut costs, where that is more than the limits allow; else ""."""
    increase = cost.pruned_perplexity / cost.dense_perplexity - 1
    if limits.perplexity_increase is not None and not increase <= limits.perplexity_increase:
        return f"perplexity rises by {increase:.2%}, more than {limits.perplexity_increase:.2%}"
    if limits.kl is not None and not cost.kl <= limits.kl:
        return f"KL is {cost.kl:.4g}, more than {limits.kl:.4g} nats per token"
    return ""


def _possible(model: nn.Module, graph: SSMGraph, make: Make, sparsity: float) -> bool:
    try:
        check_plan(make(sparsity), graph, model=model)
    except (InputError, PlanError):
        return False
    return True


@dataclass(frozen=True)
class Choice:
    """The scorer that costs least, what every one costs on calibration text, and why some could not make the cut."""

    label: str
    costs: Mapping[str, Damage]
    refused: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """As a report holds it: perplexity by scorer, or the reason."""
        return {label: cost.pruned_perplexity for label, cost in self.costs.items()} | dict(self.refused)


def choose_scorer(
    model: nn.Module,
    graph: SSMGraph,
    makes: Mapping[str, Callable[[], Plan]],
    batches: Batches,
    progress: Progress | None = None,
) -> Choice:
    """Of several scorers, each with a way to make its plan, the one of least perplexity on `batches`; first of equals.

    Raises InputError if none can make the cut.
    """
    plans: dict[str, Plan] = {}
    refused: dict[str, str] = {}
    for label, make in makes.items():
        try:
            plan = make()
            check_plan(plan, graph, model=model)
            plans[label] = plan
        except (InputError, PlanError) as error:
            refused[label] = str(error)
    if not plans:
        raise InputError(next(iter(refused.values())))
    costs = dict(zip(plans, damages(model, list(plans.values()), graph, batches, progress), strict=True))
    return Choice(min(costs, key=lambda label: costs[label].pruned_perplexity), costs, refused)


@dataclass(frozen=True)
class Settled:
    """What a search came to: whose scores, at which budget; damage curves of layers, if they were measured; and what
    was seen on the way, for the report.
    """

    label: str
    budget: ResolvedBudget
    curves: Mapping[str, Curve] | None
    evidence: dict[str, Any]


def settle(
    model: nn.Module,
    graph: SSMGraph,
    groups: Mapping[str, DependencyGroup],
    scores: Mapping[str, Scores],
    budget: ResolvedBudget,
    limits: Limits | None,
    data: Calibration,
    progress: Progress | None = None,
) -> Settled:
    """From one-shot scores of one scorer or several to one scorer and one budget. The model is on its device.

    With limits each scorer's cut is sought. Of several scorers, with limits of size, the one whose cut costs least is
    taken; with limits of damage alone, the one with the largest cut, and of equal cuts the one that costs least.
    Raises InputError where none can make the cut.
    """
    batches = list(data.batches(logits=True))
    curves: Mapping[str, Curve] | None = None
    if budget.allocation == "adaptive":
        if len(scores) > 1:
            raise InputError("allocation adaptive measures the layers of one scorer; name it, instead of auto")
        (only,) = scores.values()
        curves = damage_curves(model, only, data, budget.multiple_of, progress).curves
    evidence: dict[str, Any] = {"curves": curves} if curves else {}

    def cut(scored: Scores, sparsity: float | Mapping[str, float] | None) -> Plan:
        return plan_within(graph, scored, replace(budget, sparsity=sparsity), curves)

    removes: dict[str, float | Mapping[str, float] | None] = dict.fromkeys(scores, budget.sparsity)
    refused: dict[str, str] = {}
    met: dict[str, Found] = {}
    if limits is not None:
        candidates = fractions(groups, budget.multiple_of, budget.fit)
        for label, scored in scores.items():
            try:
                met[label] = meet(model, graph, partial(cut, scored), candidates, limits, batches, progress)
            except InputError as error:
                refused[label] = str(error)
        if not met:
            raise InputError(next(iter(refused.values())))
        most = max(found.sparsity for found in met.values())
        less = {label: found.sparsity for label, found in met.items() if found.sparsity < most and not limits.of_size}
        refused |= {
            label: f"within the limits it removes {smaller:.1%}; another more" for label, smaller in less.items()
        }
        removes = {label: found.sparsity for label, found in met.items() if label not in less}
    label = next(iter(removes))
    if len(scores) > 1:
        makes = {name: partial(cut, scores[name], sparsity) for name, sparsity in removes.items()}
        choice = choose_scorer(model, graph, makes, batches, progress)
        label = choice.label
        evidence["scorers"] = choice.to_json() | refused
    if limits is not None:
        evidence["curve"] = met[label].to_json()
    budget = replace(budget, sparsity=removes[label])
    return Settled(label, budget, curves, evidence)


def fraction_of_size(
    model: nn.Module,
    graph: SSMGraph,
    groups: Mapping[str, DependencyGroup],
    budget: ResolvedBudget,
    limits: Limits,
) -> float:
    """The fraction that meets limits of size, whatever the scores; for uniform cuts. Raises InputError as `meet`."""
    none = Scores({name: torch.zeros(group.groups, group.units) for name, group in groups.items()})
    found = meet(
        model,
        graph,
        lambda sparsity: plan_within(graph, none, replace(budget, sparsity=sparsity)),
        fractions(groups, budget.multiple_of, budget.fit),
        limits,
    )
    return found.sparsity


def same_size(plan: Plan, graph: SSMGraph, multiple_of: int, make: Callable[[int], Plan]) -> Plan | None:
    """For a plan whose layers keep different sizes on one axis: the plan with one size for all, a multiple of
    `multiple_of`, and as many units, as stock classes can load it. None where all sizes are the same. make: units kept
    in every set -> plan.

    Layers that the plan leaves whole count with all their units.
    """
    axes = {axis_of(name) for name in plan.groups}
    if len(axes) != 1 or plan.elements:
        return None
    groups = graph.on_axis(*axes)
    kept = {name: plan.groups[name].after if name in plan.groups else group.units for name, group in groups.items()}
    if len(set(kept.values())) == 1 or len({group.units for group in groups.values()}) > 1:
        return None
    sets = {name: group.groups for name, group in groups.items()}
    mean = sum(sets[n] * k for n, k in kept.items()) / sum(sets.values())
    step = math.lcm(multiple_of, *(group.multiple_of for group in groups.values()))
    return make(max(step, int(mean // step) * step))
