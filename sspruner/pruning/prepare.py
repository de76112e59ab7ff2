"""Prepare a prune: trace, validate, calibrate, and choose the cutter, before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from sspruner.benchmarking.engine_limit import engine_limit
from sspruner.budgets.allocate import allocate
from sspruner.budgets.budget import ResolvedBudget
from sspruner.budgets.decide import check_budget, rounded
from sspruner.budgets.resolve import check_values, resolve_budget
from sspruner.calibrate.sources import Calibration, Progress, check_held_out, nothing, with_more
from sspruner.compute.device import on_device
from sspruner.compute.forward import no_tokens, predicts_tokens
from sspruner.compute.processes import from_one
from sspruner.errors import InputError
from sspruner.formats.fitting import check_cut, check_request, trial
from sspruner.formats.targets import Fit, fit_to
from sspruner.pruning.cutter import cutter_for
from sspruner.pruning.refit import check_calibration
from sspruner.pruning.report import model_size
from sspruner.pruning.search import check_not_met, fraction_of_size
from sspruner.pruning.stages import Clock, Machine, PruneJob
from sspruner.recipes.parts import CalibrationText, Reconstruction
from sspruner.recipes.recipe import Recipe
from sspruner.scoring.choice import choose_scorers
from sspruner.scoring.known import find_scorer
from sspruner.scoring.run import Run
from sspruner.scoring.score import Source
from sspruner.surgery.sizes import sizes


def check_recipe(recipe: Recipe) -> None:
    """Check a recipe without a model. Raises InputError for invalid or contradictory options."""
    check_values(recipe)
    for scorer in choose_scorers(recipe.method.scorer, recipe.method.basis, recipe.remove.axes):
        for name in scorer.values() if isinstance(scorer, Mapping) else [scorer]:
            if isinstance(name, str):
                find_scorer(name)


def prepare(model: nn.Module, recipe: Recipe, machine: Machine) -> PruneJob:
    """Trace the model, resolve the budget for it, load the calibration, and choose the cutter. Changes nothing."""
    check_recipe(recipe)
    method, limits = recipe.method, recipe.limits
    scorers = choose_scorers(method.scorer, method.basis, recipe.remove.axes)
    run = Run(
        model, scorers, recipe.remove.axes, dict(method.options), method.seed, machine.device, tolerant=len(scorers) > 1
    )
    engine = engine_limit(model, run.graph, recipe)
    check_not_met(sizes(model, run.graph), limits, engine)
    if (asked := _asks_for_damage(recipe, len(run.jobs))) and not predicts_tokens(model):
        raise InputError(f"{asked} measures perplexity, and {no_tokens(model)}; say how much with sparsity or keep")
    budget, fit = _fitted(run, recipe)
    budget = replace(budget, engine=engine)
    lines = [] if limits else rounded(run.groups, budget)  # limits only choose sizes that the target supports
    one_shot = method.one_shot or len(run.jobs) > 1 or budget.compares_layers(run.groups, run.granularity)
    source = recipe.calibration.source if machine.calibration is None else machine.calibration
    cutter = cutter_for(run, recipe, budget, source, machine)
    if not limits:
        check_budget(run.groups, budget)
    elif not (one_shot or limits.of_damage or run.has_basis or any(group.blocks for group in run.groups.values())):
        budget = replace(budget, sparsity=fraction_of_size(model, run.graph, run.groups, budget, limits))
    else:
        one_shot = True
    dense, clock = model_size(model, run.graph), Clock()
    with on_device(model, run.device), clock("calibration"):
        if run.needs_data or method.refit != "none" or predicts_tokens(model):
            settings = (recipe.calibration, method.refit, recipe.reconstruction, method.seed)
            data, refit_text = texts(source, model, machine.tokenizer, settings, machine.progress)
        else:  # no damage to measure either
            data = refit_text = nothing(method.seed)
    check_held_out(model, data, refit_text)
    if method.refit != "none":
        check_calibration(model, run.graph, run.groups, method.refit, refit_text, recipe.reconstruction)
    return PruneJob(recipe, machine, run, budget, fit, lines, one_shot, dense, data, refit_text, clock, cutter)


def texts(
    source: Source,
    model: nn.Module,
    tokenizer: Any,
    settings: tuple[CalibrationText, str, Reconstruction, int],
    progress: Progress | None,
) -> tuple[Calibration, Calibration]:
    """Return the calibration text, and that of the refit: more windows of it, where a reconstruction wants them.

    settings: how much text, the kind of refit, how it trains, and the seed. Of several processes the first makes both.
    """
    text, refit, reconstruction, seed = settings
    more = max(0, reconstruction.refit_windows - text.samples) if refit == "reconstruct" else 0

    def make() -> tuple[Calibration, Calibration]:
        if isinstance(source, Calibration):
            return source, source
        return with_more(source, model, tokenizer, text, more, seed, progress)

    return from_one(make)


def _asks_for_damage(recipe: Recipe, scorers: int) -> str:
    """Return what of a recipe needs the damage of cuts on calibration text, "" if nothing does."""
    if recipe.limits.of_damage:
        return "a limit of damage"
    if recipe.budget.allocation in ("adaptive", "uniform-best"):
        return f"allocation {recipe.budget.allocation}"
    return "a choice between scorers" if scorers > 1 else ""


def _fitted(run: Run, recipe: Recipe) -> tuple[ResolvedBudget, Fit | None]:
    """Return the budget in sizes that the target supports. Raises ModelError if the target cannot run the cut model."""
    budget = resolve_budget(recipe)
    fit = fit_to(run.graph, recipe.target.runtime, recipe.target.tp)
    if fit:
        check_request(fit.target, budget, recipe.method.refit, run.has_basis)
        budget = replace(budget, fit=fit)
        check_cut(run.model, trial(run.graph, allocate(run.groups, budget)), run.graph, fit.target)
    return budget, fit
