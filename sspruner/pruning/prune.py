"""Prune: score, decide, refit, cut, prove and measure by one recipe."""

from __future__ import annotations

from typing import Any

from torch import nn

from sspruner.calibrate.seen import remember, seen_by
from sspruner.calibrate.sources import Progress
from sspruner.compute.progress import shown
from sspruner.compute.settings import undisturbed
from sspruner.errors import InputError
from sspruner.pruning.decide import decide, refitted, score_for
from sspruner.pruning.prepare import prepare
from sspruner.pruning.report import report_of
from sspruner.pruning.result import Result
from sspruner.pruning.stages import Machine
from sspruner.recipes.recipe import Recipe
from sspruner.scoring.score import Source, blamed_rightly


@undisturbed
def prune(
    model: nn.Module,
    recipe: Any = None,
    *,
    calibration: Source | None = None,
    tokenizer: Any = None,
    device: str | None = None,
    cache: bool = False,
    resume: bool = False,
    progress: Progress | bool | None = None,
    **short: Any,
) -> Result:
    """Prune `model` in place: score, plan and cut layer by layer, each layer on the outputs of the cut layers before
    it.

    Args:
        recipe: a `Recipe`. Or a scorer, with the fields of a recipe's parts as `short` arguments:
            `prune(model, "ghost", axis="head", sparsity=0.5)`. The default is the scorer "ghost" and half of the state.
        calibration: the calibration text instead of the recipe's: anything that `sspruner.calibration` takes, or its
            result.
        tokenizer: tokenizer that reads text, and shows the continuations of a prompt by both models.
        device: the compute device; CUDA if there is one, else the CPU.
        cache: use cached scores where model, scorer, its code, options, calibration and seed are the same
            (docs/calibration.md).
        resume: continue the interrupted run on an offloaded model (docs/offload.md).
        progress: called with (phase, done, total); True shows bars on standard error.

    Raises:
        InputError: for invalid or contradictory options, and for a budget that removes nothing.
        ModelError: if the target cannot run the cut model.
        PluginError: for a scorer that breaks its contract.
        ProofError: if the cut model differs from the plan's prediction.

    Sequential scoring: Menezes & Kyrillidis, GHOST, arXiv 2602.11408.
    """
    recipe = as_recipe(recipe, short)
    with shown(progress) as callback:
        job = prepare(model, recipe, Machine(calibration, tokenizer, device, cache, resume, callback))
        with blamed_rightly(model, job.data, job.run.device):
            decision = refitted(job, decide(job, score_for(job)))
        outcome = job.cutter.cut(job, decision)
        remember(job.model, seen_by(decision.plan.made_by))
        return Result(model, decision.plan, decision.scores, report_of(job, decision, outcome), recipe)


def as_recipe(recipe: Any, short: dict[str, Any]) -> Recipe:
    """Return a recipe unchanged, or make one from a scorer and short arguments. Raises InputError for both at once."""
    if not isinstance(recipe, Recipe):
        return Recipe.of(**({} if recipe is None else {"scorer": recipe}), **short)
    if short:
        raise InputError(f"{next(iter(short))}: a recipe says this; change the recipe (dataclasses.replace)")
    return recipe
