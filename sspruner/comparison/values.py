"""Check what of a comparison needs neither a model nor a plugin; torch is not imported."""

from __future__ import annotations

from dataclasses import fields

from sspruner.budgets.resolve import resolve_budget
from sspruner.errors import InputError
from sspruner.recipes.compare import CompareRecipe, check_metrics
from sspruner.recipes.parts import Budget
from sspruner.recipes.recipe import Recipe

ROWS = ".rows"  # in the folder of a comparison: the finished rows
MARKS = ("compare.json", ROWS)  # a folder with one of these is a comparison


def check_values(recipe: CompareRecipe, has_passages: bool = False) -> None:
    """Raise InputError for a recipe that is invalid for every model. has_passages: they were given in Python."""
    cells, budget = recipe.cells, recipe.budget
    if (cells.scorers is not None and not cells.scorers) or not cells.sparsities:
        raise InputError("compare: name at least one scorer and one sparsity")
    if budget.allocation == "adaptive":
        raise InputError("compare: allocation adaptive measures the layers of one scorer; use prune for each")
    shared = {f.name: getattr(budget, f.name) for f in fields(budget)}
    for sparsity in map(float, cells.sparsities):
        resolve_budget(Recipe(remove=recipe.remove, budget=Budget(**shared, sparsity=sparsity)))
    check_metrics(cells.metrics, has_passages or bool(cells.lambada))
