"""Decide: turn scores into a plan, layer by layer during scoring or after all layers are scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from sspruner.budgets.budget import ResolvedBudget
from sspruner.budgets.decide import choosers, compared, make_plan, plan_within
from sspruner.calibrate.seen import with_seen
from sspruner.compute.device import on_device
from sspruner.compute.processes import from_one
from sspruner.errors import InputError
from sspruner.evaluation.damage import damages
from sspruner.formats.fitting import check_cut
from sspruner.plans.plan import check_plan
from sspruner.plans.reduction import reduction
from sspruner.pruning.refit import Refit, refit
from sspruner.pruning.search import same_size, settle
from sspruner.pruning.stages import Decision, PruneJob
from sspruner.scoring.choice import bases_not_tried, is_auto
from sspruner.scoring.run import Run
from sspruner.scoring.score import score_dense
from sspruner.scoring.scorer import Choose
from sspruner.scoring.scores import Scores
from sspruner.scoring.walk import walk
from sspruner.surgery.mask import mask_elements, mask_group, unmask, update_tensors


class Reductions:
    """The units to keep of each decided dependency group, and new values of tensors."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.kept: dict[str, torch.Tensor] = {}
        self.updates: dict[str, torch.Tensor] = {}

    def decide(self, importance: Mapping[str, torch.Tensor], choose: Mapping[str, Choose]) -> dict[str, torch.Tensor]:
        """Decide which units of some groups stay, by name.

        Return the new values of tensors that their scorers compute.
        """
        changed: dict[str, torch.Tensor] = {}
        for name, scored in importance.items():
            self.kept[name], new = self.run.reduce(self.run.groups[name], scored, choose[name])
            shared = next((tensor for tensor in new if tensor in self.updates or tensor in changed), None)
            if shared:
                raise InputError(f"{shared}: changed by the scorers of two axes; prune one after the other")
            changed |= {tensor: _as_stored(self.run.model, tensor, value) for tensor, value in new.items()}
        self.updates.update(changed)
        return changed

    def cut(self, importance: Mapping[str, torch.Tensor], choose: Mapping[str, Choose]) -> None:
        """Decide and mask some groups, so that the next layer is scored on the outputs of the cut ones."""
        model = self.run.model
        update_tensors(model, self.decide(importance, choose))  # before the masks: new values are of whole tensors
        for name in importance:
            group = self.run.groups[name]
            if group.tensor:
                mask_elements(model, group, self.kept[name])
            else:
                mask_group(model, group, reduction(self.kept[name], self.run.bases.get(name)))


@dataclass(frozen=True)
class Scored:
    """Scores by scorer, and the decisions made during scoring."""

    scores: dict[str, Scores]
    reductions: Reductions


def score_for(job: PruneJob) -> Scored:
    """Score every dependency group: layer by layer behind masks, or all on the dense model.

    Leaves the model unmasked.
    """
    run, machine = job.run, job.machine
    reductions = Reductions(run)
    journal = job.cutter.journal(job)
    with job.clock("scoring"):
        try:
            if job.one_shot:
                scores = score_dense(run, job.data, machine.cache, machine.progress, journal)
            else:
                choose = choosers(run.groups, job.budget, run.granularity)
                cut = _cut_with(reductions, choose)
                scores = walk(run, job.data, cut=cut, progress=machine.progress, journal=journal)
        finally:
            unmask(run.model)
    return Scored(scores, reductions)


def decide(job: PruneJob, scored: Scored) -> Decision:
    """Choose one scorer and one budget, and make the plan. Raises InputError for a budget that removes nothing."""
    run, recipe, budget = job.run, job.recipe, job.budget
    search: dict[str, Any] = {"limits": recipe.limits.to_json()} if recipe.limits else {}
    curves = None
    if job.one_shot:
        with job.clock("search"), on_device(run.model, run.device):
            settled = from_one(
                lambda: settle(
                    run.model,
                    run.graph,
                    run.groups,
                    scored.scores,
                    budget,
                    recipe.limits or None,
                    job.data,
                    job.machine.progress,
                )
            )
        run.jobs = [candidate for candidate in run.jobs if candidate.label == settled.label]
        budget, curves, search = settled.budget, settled.curves, search | settled.evidence
        if run.refused:
            search["scorers"] = search.get("scorers", {}) | run.refused
        if others := bases_not_tried(recipe.method.scorer, recipe.method.basis, run.axes):
            search["bases_not_tried"] = others
    scores, kept = scored.scores[run.jobs[0].label], scored.reductions.kept
    choose = choosers(run.groups, budget, run.granularity, compared(scores, budget), curves)
    late = {name: scores.importance[name] for name in run.groups if name not in kept}
    scored.reductions.decide(late, choose)
    plan = make_plan(run.groups, kept, scored.reductions.updates, scores, budget)
    if search:
        plan = replace(plan, made_by=with_seen(plan.made_by, job.data.seen))
    check_plan(plan, run.graph, model=run.model)  # which whole modules must stay is known only now
    if budget.engine:
        search["engine"] = budget.engine.to_json(plan)
    return Decision(plan, scores, budget, kept, search)


def refitted(job: PruneJob, decision: Decision) -> Decision:
    """Refit the units that stay, if the recipe says so, and compute the plan of one size.

    Raises ModelError if the target cannot run the cut model.
    """
    run, kind = job.run, job.recipe.method.refit
    plan = decision.plan
    if kind != "none":
        with job.clock("refit"):
            better = refit(
                run.model,
                plan,
                kind,
                calibration=job.refit_text,
                settings=job.recipe.reconstruction,
                journal=job.cutter.journal(job),
                device=job.machine.device,
                progress=job.machine.progress,
            )
        decision = _weighed(job, decision, better)
    if job.cutter.compares_one_size:
        one_size = same_size(
            plan,
            run.graph,
            job.recipe.budget.multiple_of,
            lambda keep: plan_within(run.graph, decision.scores, ResolvedBudget(keep=keep)),
        )
        decision = replace(decision, one_size=one_size)
    if job.fit:
        check_cut(run.model, decision.plan, run.graph, job.fit.target)
    return decision


def _weighed(job: PruneJob, decision: Decision, better: Refit) -> Decision:
    """Return the decision with its refit; where the scorer is auto, without it if that has the lower perplexity.

    Both are measured on the calibration text, and noted for the report.
    """
    run, plan, search = job.run, decision.plan, decision.search
    fitted = replace(decision, plan=better.plan, selected=plan, errors=better.errors, layers=better.layers)
    if not (job.one_shot and is_auto(job.recipe.method.scorer)):
        return fitted
    with job.clock("comparing refits"), on_device(run.model, run.device):
        batches, plans = job.data.batches(logits=True), [plan, better.plan]
        costs = from_one(lambda: damages(run.model, plans, run.graph, batches, job.machine.progress))
    tried = {kind: cost.pruned_perplexity for kind, cost in zip(("none", better.kind), costs, strict=True)}
    search = search | {"refits": tried | {"seconds": job.clock.seconds["refit"]}}
    return replace(fitted if tried[better.kind] < tried["none"] else decision, search=search)


def _cut_with(reductions: Reductions, choose: Mapping[str, Choose]) -> Any:
    return lambda importance: reductions.cut(importance, choose)


def _as_stored(model: nn.Module, name: str, value: torch.Tensor) -> torch.Tensor:
    """Return a new value in the dtype in which the model stores the parameter; a new bias gets the weight's dtype."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    like = parameters.get(name, parameters.get(name.removesuffix("bias") + "weight"))
    return value if like is None else value.to(like.dtype)
