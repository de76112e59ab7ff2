"""Cutters: one interface to prune a model in memory, or an offloaded model block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sspruner.budgets.budget import ResolvedBudget
from sspruner.calibrate.encode import PAGE, page
from sspruner.compute.device import offloaded, on_device
from sspruner.compute.forward import predicts_tokens
from sspruner.compute.quick import quick_on_cpu
from sspruner.errors import InputError
from sspruner.evaluation.continuation import continuation
from sspruner.evaluation.damage import Damage, damages
from sspruner.evaluation.output_error import OutputError, output_errors
from sspruner.files.journal import Journal
from sspruner.pruning.blockwise import check_offloaded, cut_by_blocks, journal_for
from sspruner.pruning.stages import Cutter, Decision, Machine, Outcome, PruneJob
from sspruner.recipes.recipe import Recipe
from sspruner.scoring.run import Run
from sspruner.surgery.mask import mask
from sspruner.surgery.proof import slice_with_proof

PROMPT_TOKENS, PROMPT_CHARACTERS, NEW_TOKENS = 24, 200, 40


class InMemory:
    """Cutter of a model that is in memory as a whole."""

    compares_one_size = True

    def journal(self, job: PruneJob) -> None:
        """Return None: such a run cannot be resumed."""
        return

    def cut(self, job: PruneJob, decision: Decision) -> Outcome:
        """See `Cutter.cut`."""
        model, run, method = job.model, job.run, job.recipe.method
        asked = {"selected": decision.selected or decision.plan, "cut": decision.plan, "one size": decision.one_size}
        if decision.selected is None:
            del asked["cut"]
        plans = {name: plan for name, plan in asked.items() if plan is not None}
        with on_device(model, run.device):
            dense = _continuation(job)
            measure = damages if predicts_tokens(model) else output_errors
            with job.clock("evaluation"):
                found: Sequence[Damage | OutputError] = measure(
                    model, [*plans.values()], run.graph, job.data.held_out_batches()
                )
            costs = dict(zip(plans, found, strict=True)) if found else {}
        with on_device(model, run.device):
            proof = None
            with job.clock("proof"):
                if method.mode == "slice":
                    proof = slice_with_proof(model, decision.plan, run.graph, method.seed)
            if method.mode == "mask":
                mask(model, decision.plan, run.graph)
            pruned = _continuation(job)
        texts = None
        if dense is not None:
            prompt = job.machine.tokenizer.decode(_prompt(job), skip_special_tokens=True)
            texts = {"prompt": prompt, "dense": dense, "pruned": pruned}
        selected = costs.get("selected")
        return Outcome(costs.get("cut", selected), selected, costs.get("one size"), proof, texts)


class BlockByBlock:
    """Cutter of a model whose blocks are on disk or on several devices: cuts each block once, with a journal."""

    compares_one_size = False

    def __init__(self) -> None:
        self._journal: Journal | None = None

    def journal(self, job: PruneJob) -> Journal:
        """Return the journal in the model's folder; a resumed run starts after the blocks that it holds."""
        if self._journal is None:
            kind, texts = job.recipe.method.refit, (job.data, job.refit_text)
            refit = (kind, job.recipe.reconstruction.refit_steps, job.recipe.reconstruction.refit_windows)
            self._journal = journal_for(job.run, job.budget, texts, refit, job.one_shot, job.machine.resume)
        return self._journal

    def cut(self, job: PruneJob, decision: Decision) -> Outcome:
        """See `Cutter.cut`. Generates no text: the model would be read once for every token."""
        with job.clock("evaluation and proof"), quick_on_cpu(job.model, job.run.device):
            cost, proof = cut_by_blocks(
                job.model,
                decision.plan,
                job.run.graph,
                job.data,
                device=job.run.device,
                seed=job.recipe.method.seed,
                journal=self.journal(job),
                progress=job.machine.progress,
            )
        return Outcome(cost, cost, None, proof, None)


def cutter_for(run: Run, recipe: Recipe, budget: ResolvedBudget, source: Any, machine: Machine) -> Cutter:
    """Choose the cutter by where the model is.

    Raises InputError for options that an offloaded model does not support.
    """
    if offloaded(run.model) is None:
        if machine.resume:
            raise InputError("resume goes on with a run on an offloaded model: load it with offload")
        return InMemory()
    method = recipe.method
    check_offloaded(run, budget, recipe.limits or None, method.mode, method.refit, source)
    return BlockByBlock()


def _prompt(job: PruneJob) -> torch.Tensor:
    """Return the first tokens of the held-out text from its first whole word on, or those of the page that ships: (T,).

    Text without spaces begins where its window does.
    """
    ids = job.data.held_out[0][job.data.held_out_mask[0]][:PROMPT_TOKENS]
    tokenizer = job.machine.tokenizer
    text = page()[:PROMPT_CHARACTERS] if job.data.source == PAGE else tokenizer.decode(ids).partition(" ")[2]
    words = tokenizer(text, add_special_tokens=False)["input_ids"][:PROMPT_TOKENS]
    return torch.tensor(words) if len(words) > 1 else ids


def _continuation(job: PruneJob) -> str | None:
    """Continue the prompt greedily; None without a tokenizer, for models that predict no tokens, and for those of
    mamba_ssm (a different generate method).
    """
    tokenizer = job.machine.tokenizer
    if tokenizer is None or not hasattr(job.model, "generation_config") or not predicts_tokens(job.model):
        return None
    return continuation(job.model, tokenizer, _prompt(job), NEW_TOKENS)
