"""Search: choose the scorer with the least damage, and the cut that meets limits in users' units.

The scores are computed once. Each cut is measured under its mask on calibration text; the final damage in the report is
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

from sspruner.axes import axis_of
from sspruner.benchmarking.engine_limit import EngineLimit
from sspruner.budgets.budget import Fit, ResolvedBudget
from sspruner.budgets.decide import plan_within
from sspruner.budgets.split import Curve
from sspruner.calibrate.sources import Calibration, Progress
from sspruner.errors import AlreadyMet, InputError, PlanError
from sspruner.evaluation.damage import Damage, damages
from sspruner.graph.group import DependencyGroup
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.plans.plan import Plan, check_plan
from sspruner.pruning.sensitivity import damage_curves
from sspruner.recipes.parts import Limits
from sspruner.scoring.scores import Scores
from sspruner.surgery.sizes import Sizes, sizes, used

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]
Make = Callable[[float], Plan]  # fraction to remove -> plan; raises InputError for an impossible one


@dataclass(frozen=True)
class Point:
    """One cut of the search. perplexity, kl: on calibration text, None where only the size was needed."""

    sparsity: float
    parameters: int
    state_bytes: int
    perplexity: float | None = None
    kl: float | None = None


@dataclass(frozen=True)
class Found:
    """The fraction to remove that meets the limits, and the cuts that were tried, mildest first.

    dense_perplexity: of the dense model on the same text, None where only the size was needed.
    """

    sparsity: float
    curve: tuple[Point, ...]
    dense_perplexity: float | None = None

    def to_json(self) -> list[dict[str, Any]]:
        """Return the curve as in the report."""
        return [asdict(point) for point in self.curve]


def fractions(groups: Mapping[str, DependencyGroup], multiple_of: int, fit: Fit | None = None) -> list[float]:
    """Return the fractions to remove that lead to different sizes, mildest first: the steps of the largest group.

    fit: restricts them to sizes that a runtime supports.
    """
    units = max(group.units for group in groups.values())
    if fit:
        return [1 - kept / units for kept in reversed(fit.takes(next(iter(groups.values())).axis))]
    step = math.lcm(multiple_of, *(group.multiple_of for group in groups.values()))
    counts = max(groups.values(), key=lambda group: group.units).counts(step)
    return [1 - kept / units for kept in reversed(counts)]


def meet(
    model: nn.Module,
    graph: SSMGraph,
    make: Make,
    candidates: Sequence[float],
    limits: Limits,
    batches: Batches = (),
    progress: Progress | None = None,
    engine: EngineLimit | None = None,
) -> Found:
    """Find the cut that meets limits: with limits of size the mildest that fits; of damage alone the largest that stays
    within.

    Both are found by bisection over `candidates` (fractions, mildest first): sizes fall and damage rises along them.
    Damage need not rise monotonically: the result has been measured and is within its limit. The sequences that an
    engine holds do not rise monotonically either, in steps of whole blocks: there all cuts are tried, mildest first.
    Raises InputError if no cut meets the limits, with the size or damage of the nearest.
    """
    possible = [s for s in candidates if _is_possible(model, graph, make, s)]
    if not possible:
        raise InputError("limits: no size of this axis can be cut to")
    dense, batches = sizes(model, graph), list(batches)
    seen: dict[int, Point] = {}
    perplexities: list[float] = []  # of the dense model

    @cache
    def size(i: int) -> Sizes:
        measured_size = sizes(model, graph, make(possible[i]))
        seen[i] = Point(possible[i], measured_size.parameters, measured_size.state_bytes)
        return measured_size

    @cache
    def excess(i: int) -> str:
        return _excess(size(i), dense, limits, engine, make(possible[i]))

    @cache
    def cost(i: int) -> Damage:
        if progress:
            progress(f"measuring {possible[i]:.0%}", len(seen), len(possible))
        (damage,) = damages(model, [make(possible[i])], graph, batches)
        measured_size = size(i)
        perplexities.append(damage.dense_perplexity)
        seen[i] = Point(
            possible[i], measured_size.parameters, measured_size.state_bytes, damage.pruned_perplexity, damage.kl
        )
        return damage

    if limits.of_size:
        check_not_met(dense, limits, engine)
        if engine is not None:
            chosen = next((i for i in range(len(possible)) if not excess(i)), len(possible) - 1)
        else:
            chosen = len(possible) - 1 if excess(len(possible) - 1) else _first(lambda i: not excess(i), len(possible))
        if why := excess(chosen):
            raise InputError(f"{why} even with {possible[-1]:.1%} of the axis removed; cut another axis, too")
        if limits.of_damage and (why := _too_much(cost(chosen), limits)):
            raise InputError(f"the mildest cut that fits removes {possible[chosen]:.1%}, and {why}")
    else:
        chosen = _first(lambda i: bool(_too_much(cost(i), limits)), len(possible)) - 1
        if chosen < 0:
            raise InputError(f"even the mildest cut, {possible[0]:.1%}: {_too_much(cost(0), limits)}")
    return Found(possible[chosen], tuple(seen[i] for i in sorted(seen)), next(iter(perplexities), None))


def check_not_met(dense: Sizes, limits: Limits, engine: EngineLimit | None = None) -> None:
    """Raise AlreadyMet, with the numbers, if the dense model is within all limits of size."""
    if limits.of_size and not _excess(dense, dense, limits, engine):
        paper = used(dense, engine.on_paper(limits) if engine else limits, dense)
        both = ", ".join(filter(None, (paper, engine.used() if engine else "")))
        raise AlreadyMet(f"the dense model is within the limits: {both}; nothing was removed, nothing written")


def _excess(now: Sizes, dense: Sizes, limits: Limits, engine: EngineLimit | None, plan: Plan | None = None) -> str:
    """Return which limit of size a cut exceeds, "" if none is. plan: the cut, None for the dense model."""
    if engine is None:
        return now.exceeds(limits, dense)
    return now.exceeds(engine.on_paper(limits), dense) or engine.exceeds(plan)


def _first(holds: Callable[[int], bool], count: int) -> int:
    """Return the first of `count` numbers from which on a condition holds, by bisection; `count` if it never does."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _too_much(cost: Damage, limits: Limits) -> str:
    """Return the damage of a cut as text if it exceeds the limits; else ""."""
    increase = cost.pruned_perplexity / cost.dense_perplexity - 1
    if limits.perplexity_increase is not None and not increase <= limits.perplexity_increase:
        return f"perplexity rises by {increase:.2%}, more than {limits.perplexity_increase:.2%}"
    if limits.kl is not None and not cost.kl <= limits.kl:
        return f"KL is {cost.kl:.4g}, more than {limits.kl:.4g} nats per token"
    return ""


def _is_possible(model: nn.Module, graph: SSMGraph, make: Make, sparsity: float) -> bool:
    try:
        check_plan(make(sparsity), graph, model=model)
    except (InputError, PlanError):
        return False
    return True


@dataclass(frozen=True)
class Choice:
    """The scorer with the least damage, the damage of each on calibration text, and why some cannot make the cut."""

    label: str
    costs: Mapping[str, Damage]
    refused: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return perplexity by scorer, or the reason of its refusal, as in the report."""
        return {label: cost.pruned_perplexity for label, cost in self.costs.items()} | dict(self.refused)


def choose_scorer(
    model: nn.Module,
    graph: SSMGraph,
    makes: Mapping[str, Callable[[], Plan]],
    batches: Batches,
    progress: Progress | None = None,
) -> Choice:
    """Choose the scorer whose plan has the lowest perplexity on `batches`; the first of equals.

    makes: scorer -> a function that makes its plan.

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
    """Outcome of a search: the chosen scorer and budget, damage curves of layers if they were measured, and the
    measurements for the report.
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
    """Choose one scorer and one budget from one-shot scores of one or several scorers. The model is on its device.

    With limits, each scorer's cut is searched. With limits of size, choose the scorer whose cut has the least damage;
    with limits of damage alone, the scorer with the largest cut, and of equal cuts the one with the least damage.
    Raises InputError if no scorer can make the cut.
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
                make = partial(cut, scored)
                met[label] = meet(model, graph, make, candidates, limits, batches, progress, budget.engine)
            except AlreadyMet:
                raise
            except InputError as error:
                refused[label] = str(error)
        if not met:
            raise InputError(next(iter(refused.values())))
        most = max(one.sparsity for one in met.values())
        less = {label: one.sparsity for label, one in met.items() if one.sparsity < most and not limits.of_size}
        refused |= {
            label: f"within the limits it removes {smaller:.1%}; another more" for label, smaller in less.items()
        }
        removes = {label: one.sparsity for label, one in met.items() if label not in less}
    label = next(iter(removes))
    if len(scores) > 1:
        makes = {name: partial(cut, scores[name], sparsity) for name, sparsity in removes.items()}
        choice = choose_scorer(model, graph, makes, batches, progress)
        label = choice.label
        evidence["scorers"] = choice.to_json() | refused
    if limits is not None:
        evidence |= {"curve": met[label].to_json(), "chosen": met[label].sparsity}
        if met[label].dense_perplexity is not None:
            evidence["dense_perplexity"] = met[label].dense_perplexity
    budget = replace(budget, sparsity=removes[label])
    return Settled(label, budget, curves, evidence)


def fraction_of_size(
    model: nn.Module,
    graph: SSMGraph,
    groups: Mapping[str, DependencyGroup],
    budget: ResolvedBudget,
    limits: Limits,
) -> float:
    """Return the fraction that meets limits of size; valid for uniform cuts whatever the scores. Raises as `meet`."""
    none = Scores({name: torch.zeros(group.groups, group.units) for name, group in groups.items()})
    search = meet(
        model,
        graph,
        lambda sparsity: plan_within(graph, none, replace(budget, sparsity=sparsity)),
        fractions(groups, budget.multiple_of, budget.fit),
        limits,
        engine=budget.engine,
    )
    return search.sparsity


def same_size(plan: Plan, graph: SSMGraph, multiple_of: int, make: Callable[[int], Plan]) -> Plan | None:
    """Return the plan with one size for all layers, if the given plan keeps different sizes on one axis; else None.

    The size is a multiple of `multiple_of` and keeps about as many units in total, so that stock classes can load the
    model. Layers that the plan does not cut count with all their units. make: units to keep per layer -> plan.
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
    least = max(step, *(group.least for group in groups.values()))
    return make(max(math.ceil(least / step), int(mean // step)) * step)
