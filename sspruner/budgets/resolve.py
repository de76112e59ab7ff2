"""Resolve the budget of a recipe: one fraction for each axis, validated before any work."""

from __future__ import annotations

from sspruner.axes import ELEMENT_AXES
from sspruner.budgets.budget import Fit, ResolvedBudget, pattern_sparsity
from sspruner.errors import InputError
from sspruner.formats.targets import chosen
from sspruner.recipes.recipe import Recipe
from sspruner.recipes.serving import engine_of

BEST_SIZE = "uniform-best"


def resolve_budget(recipe: Recipe, fit: Fit | None = None) -> ResolvedBudget:
    """Return the budget of a recipe. With limits, its fraction is a placeholder until the search finds one.

    fit: rounds to the sizes that a runtime supports. Raises InputError for invalid fractions, or several for one axis.
    """
    axis, budget, elements = recipe.remove.axis, recipe.budget, recipe.elements
    sparsity, keep, allocation = budget.sparsity, budget.keep, budget.allocation
    if recipe.limits:
        _check_limits(recipe)
    if allocation == BEST_SIZE:
        if not recipe.limits.of_damage or budget.ratios or budget.floor or budget.cap:
            raise InputError(
                f"allocation {BEST_SIZE} finds the smallest one size for all layers within a limit of damage: give "
                "max-ppl-increase or max-kl, and no ratios, floor or cap"
            )
        allocation = "uniform"
    if isinstance(axis, str):
        if sparsity is None and keep is None:
            sparsity = pattern_sparsity(elements.pattern) if elements.pattern else 0.5
    elif sparsity is not None or keep is not None:
        raise InputError("every axis has its own fraction; leave out sparsity and keep, or name one axis alone")
    return ResolvedBudget(
        sparsity if isinstance(axis, str) else axis,
        keep,
        allocation,
        budget.multiple_of,
        budget.ratios,
        recipe.remove.ignore,
        elements.pattern,
        elements.granularity,
        elements.rows,
        budget.normalise,
        budget.floor,
        budget.cap,
        fit,
    )


def check_values(recipe: Recipe) -> None:
    """Check what needs neither a model nor a plugin; torch is not imported. Raises InputError."""
    resolve_budget(recipe)
    chosen(recipe.target.runtime, recipe.target.tp)
    if recipe.serving.given and not (engine_of(recipe.target.runtime) and recipe.limits.max_batch):
        raise InputError(
            f"{recipe.serving.given[0]}: decides how many sequences an engine holds: give max-batch and target vllm or "
            "llama.cpp, too"
        )
    if recipe.method.refit == "bias" and (recipe.limits.parameters or recipe.limits.memory):
        raise InputError("refit bias adds parameters, which limits do not foresee: use refit output")


def _check_limits(recipe: Recipe) -> None:
    """Raise InputError if both limits and fractions are given, or if limits do not name a single axis of units."""
    axis = recipe.remove.axis
    if not isinstance(axis, str) or axis in ELEMENT_AXES:
        raise InputError("limits decide how much of one axis of units is removed: name one axis, without a fraction")
    if recipe.budget.sparsity is not None or recipe.budget.keep is not None or recipe.elements.pattern:
        raise InputError("limits decide how much is removed: leave out sparsity, keep and pattern")
