"""Decide what to keep of every dependency group, from scores and a budget, and make the plan."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from sspruner.axes import ELEMENT_AXES, axis_of
from sspruner.budgets.allocate import allocate
from sspruner.budgets.budget import ResolvedBudget, ignored, pattern_sparsity, protected, ratio_of
from sspruner.budgets.comparable import comparable
from sspruner.budgets.elements import check_pattern, choose, choose_globally, competing
from sspruner.budgets.resolve import resolve_budget
from sspruner.budgets.split import Curve
from sspruner.errors import InputError, PlanError
from sspruner.formats.targets import fit_to
from sspruner.graph.group import DependencyGroup
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Basis, Reduction, reduction
from sspruner.recipes.recipe import Recipe
from sspruner.scoring.scorer import Choose
from sspruner.scoring.scores import Scores


def plan(
    graph: SSMGraph,
    scores: Scores,
    recipe: Recipe | None = None,
    *,
    curves: Mapping[str, Curve] | None = None,
    **short: Any,
) -> Plan:
    """Return a plan that keeps the highest-scored units of every dependency group in `scores`, on one or several axes.

    recipe  what to remove, how much, and for which runtime
    short   instead of a recipe, its fields: `sparsity=0.5`; sparsity may be a mapping with one for each axis
    curves  damage of each layer, which sspruner.sensitivity measures, for allocation="adaptive" (docs/allocation.md)

    allocation="global" lets layers compete. With a `target` the sizes are rounded to those that this runtime supports,
    over `tp` GPUs (docs/targets.md). Scorers that change weights do so in `prune` only.

    Raises InputError for an impossible budget, PlanError if the scores do not fit the graph, ModelError for a model
    that the target does not serve.
    """
    recipe = _plan_recipe(recipe, short)
    budget = resolve_budget(recipe, fit_to(graph, recipe.target.runtime, recipe.target.tp))
    result = plan_within(graph, scores, budget, curves)
    if budget.fit is None:
        return result
    lines = rounded({name: graph.groups[name] for name in scores.importance if name in graph.groups}, budget)
    return replace(result, made_by=result.made_by | {"target": {**budget.fit.to_json(), "rounded": lines}})


def _plan_recipe(recipe: Recipe | None, short: dict[str, Any]) -> Recipe:
    """Make a recipe from short arguments. Raises InputError if they do not define how much to remove."""
    if recipe is not None:
        if short:
            raise InputError(f"{next(iter(short))}: a recipe says this; change the recipe (dataclasses.replace)")
        if recipe.limits:
            raise InputError("limits are met in `prune`, which measures cuts: give sparsity or keep")
        return recipe
    options = {name: value for name, value in short.items() if value is not None}
    sparsity = options.get("sparsity")
    if isinstance(sparsity, Mapping):
        if "keep" in options:
            raise InputError("give either sparsity (a fraction to remove) or keep (units left), not both or neither")
        options["axis"] = options.pop("sparsity")
    elif ("sparsity" in options) == ("keep" in options) and not (options.get("pattern") and sparsity is None):
        raise InputError("give either sparsity (a fraction to remove) or keep (units left), not both or neither")
    return Recipe.of(**options)


def rounded(groups: Mapping[str, DependencyGroup], budget: ResolvedBudget) -> list[str]:
    """Describe how the rounding to a target's sizes changes a uniform budget."""
    if budget.fit is None:
        return []
    return budget.fit.changes(allocate(groups, replace(budget, fit=None)), allocate(groups, budget))


def plan_within(
    graph: SSMGraph, scores: Scores, budget: ResolvedBudget, curves: Mapping[str, Curve] | None = None
) -> Plan:
    """Return a plan that keeps the highest-scored units within a ResolvedBudget.

    Raises PlanError if the scores do not fit the graph, InputError for an impossible budget.
    """
    known = {**graph.groups, **graph.elements}
    for name, importance in scores.importance.items():
        group = known.get(name)
        if group is None or tuple(importance.shape) != (group.groups, group.units):
            raise PlanError(f"{name}: scores of shape {tuple(importance.shape)} do not fit this model; score it again")
    groups = {name: group for name, group in known.items() if name in scores.importance}
    by_axis = json.loads(scores.metadata.get("granularity", "{}"))
    choose = choosers(groups, budget, by_axis, compared(scores, budget), curves)
    return make_plan(groups, {n: choose[n](scores.importance[n]) for n in groups}, {}, scores, budget)


def make_plan(
    groups: Mapping[str, DependencyGroup],
    keep: Mapping[str, torch.Tensor],
    updates: Mapping[str, torch.Tensor],
    scores: Scores,
    budget: ResolvedBudget,
) -> Plan:
    """Return the plan that keeps `keep`, name -> bool (groups, units), and sets new values of tensors.

    Raises InputError if nothing is removed.
    """
    cut = {name: stays for name, stays in keep.items() if not stays.all()}
    if not cut:
        raise InputError("the budget removes nothing: every dependency group keeps all its units")
    return Plan(
        {n: reduction(stays, scores.bases.get(n)) for n, stays in cut.items() if not groups[n].tensor},
        {"fingerprint": scores.metadata.get("model", "")},
        {**scores.metadata, **budget.to_json()},
        elements={name: stays for name, stays in cut.items() if groups[name].tensor},
        updates=dict(updates),
    )


def choosers(
    groups: Mapping[str, DependencyGroup],
    budget: ResolvedBudget,
    granularity: Mapping[str, str],
    importance: Mapping[str, torch.Tensor] | None = None,
    curves: Mapping[str, Curve] | None = None,
) -> dict[str, Choose]:
    """Return for every dependency group the function that selects its units.

    Each maps scores (groups, units) to bool of the same shape.

    granularity  the scorers' own, by axis
    importance   all scores, if layers compete (`compared`)
    curves       damage of cutting each layer alone, for the allocation "adaptive"

    Raises InputError for a pattern that matches nothing, and for a budget that a group cannot meet; the message has the
    nearest that it can meet.
    """
    counts = allocate(groups, budget, importance, curves)
    selectors: dict[str, Choose] = {
        name: partial(_best_units, count=counts[name], protected=protected(group, budget.ignore))
        for name, group in groups.items()
        if not group.tensor
    }
    elements = {name: group for name, group in groups.items() if group.tensor}
    return selectors | _element_choosers(elements, budget, granularity, importance)


def compared(scores: Scores, budget: ResolvedBudget) -> dict[str, torch.Tensor]:
    """Return all scores, comparable between layers by the budget's normalisation, or by the scorer's default."""
    declared = json.loads(
        scores.metadata.get("comparable", "{}")
    )  # axis -> whether scores are comparable without scaling
    axes = {axis_of(name) for name in scores.importance} - ELEMENT_AXES
    return comparable(
        scores.importance,
        {axis: budget.normalise or ("none" if declared.get(axis, True) else "energy") for axis in axes},
    )


def _element_choosers(
    groups: Mapping[str, DependencyGroup],
    budget: ResolvedBudget,
    granularity: Mapping[str, str],
    importance: Mapping[str, torch.Tensor] | None,
) -> dict[str, Choose]:
    if not groups:
        if budget.pattern or budget.granularity or budget.rows:
            raise InputError("pattern, granularity and rows are for single elements: axis weight")
        return {}
    known = sorted({run for group in groups.values() for run in group.runs or {}})
    for run in budget.rows:
        if run not in known:
            raise InputError(f"rows {run!r}: no tensor has such rows; these are known: {', '.join(known)}")
    selectors: dict[str, Choose] = {}
    competing_groups: dict[tuple[str, float], list[str]] = {}
    rows = {name: competing(group, tuple(budget.rows)) for name, group in groups.items()}
    for name, group in groups.items():
        sparsity = 0.0 if ignored(name, budget.ignore) else ratio_of(name, budget)
        where = budget.granularity_of(group.axis, granularity)
        if sparsity and budget.pattern and not math.isclose(sparsity, pattern_sparsity(budget.pattern)):
            removes = pattern_sparsity(budget.pattern)
            raise InputError(f"{name}: pattern {budget.pattern} removes {removes:g}, not {sparsity:g}; leave one out")
        if not sparsity or not rows[name].any():
            selectors[name] = _whole
        elif where == "global":
            competing_groups.setdefault((group.axis, sparsity), []).append(name)
        else:
            if budget.pattern:
                check_pattern(group, budget.pattern)
            selectors[name] = partial(
                choose, rows=rows[name], sparsity=sparsity, pattern=budget.pattern, granularity=where
            )
    for (_, sparsity), names in competing_groups.items():
        if importance is None:
            raise InputError("elements of all tensors compete: their scores have to be known before any is cut")
        kept = choose_globally({n: importance[n] for n in names}, {n: rows[n] for n in names}, sparsity)
        selectors |= {n: partial(_decided, kept=kept[n]) for n in names}
    return selectors


def _whole(scores: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(scores, dtype=torch.bool)


def _decided(scores: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return the selection that was decided when all scores were compared."""
    if scores.shape != kept.shape:
        raise InputError("decides by blocks of columns, which cannot compete globally; use granularity row or tensor")
    return kept


def _best_units(scores: torch.Tensor, count: int, protected: Sequence[int]) -> torch.Tensor:
    """Select the `count` best units of every set; of equal units the first. scores: (groups, units)."""
    scores = scores.clone()
    scores[:, list(protected)] = torch.inf
    best = scores.argsort(dim=-1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)


def select(
    importance: torch.Tensor, count: int, protected: Sequence[int] = (), basis: Basis | None = None
) -> Reduction:
    """Return the reduction that keeps the `count` best units of every set.

    importance: (groups, units). basis: the directions that the units are, if any.
    """
    return reduction(_best_units(importance, count, protected), basis)


def check_budget(groups: Mapping[str, DependencyGroup], budget: ResolvedBudget) -> None:
    """Raise InputError, before any work, if the budget cannot be met whatever the scores, or removes nothing."""
    elements = {name: group for name, group in groups.items() if group.tensor}
    within = budget if budget.pattern or not elements else replace(budget, granularity="tensor")
    _element_choosers(elements, within, {}, None)
    units = {name: group for name, group in groups.items() if not group.tensor}
    counts = allocate(
        groups, budget, {n: torch.zeros(g.groups, g.units) for n, g in units.items()}, {name: {} for name in units}
    )
    zeros = any(not ignored(n, budget.ignore) and ratio_of(n, budget) > 0 for n in elements)
    if not zeros and all(count == groups[name].units for name, count in counts.items()):
        raise InputError("the budget removes nothing: every dependency group keeps all its units")
