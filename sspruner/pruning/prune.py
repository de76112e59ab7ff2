"""The main job: score, plan and cut, layer by layer; then prove the cut and measure what it cost."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sspruner.budgets.allocate import allocate
from sspruner.budgets.asked import make_budget
from sspruner.budgets.decide import check_budget, choosers, compared, make_plan, plan, rounded
from sspruner.calibrate.sources import Progress
from sspruner.compute.device import offloaded, on_device
from sspruner.compute.processes import from_one
from sspruner.compute.quick import quick_on_cpu
from sspruner.errors import InputError
from sspruner.evaluation.continuation import continuation
from sspruner.evaluation.damage import damages
from sspruner.files.provenance import hub_name, peak_memory_bytes, versions
from sspruner.formats.fitting import check_asked, check_cut, trial
from sspruner.formats.targets import fit_to
from sspruner.graph.trace import trace
from sspruner.plans.plan import check_plan
from sspruner.plans.reduction import reduction
from sspruner.pruning.blockwise import check_offloaded, cut_by_blocks, journal_for
from sspruner.pruning.refit import KINDS, check_calibration
from sspruner.pruning.refit import refit as refit_plan
from sspruner.pruning.report import Report, measured, model_size, sparsity_of
from sspruner.pruning.result import Result
from sspruner.pruning.search import fraction_of_size, same_size, settle
from sspruner.recipes.parts import Limits
from sspruner.scoring.choice import scorers_asked
from sspruner.scoring.job import OneScorer
from sspruner.scoring.run import Run
from sspruner.scoring.score import Source, calibrated, score_dense
from sspruner.scoring.walk import walk
from sspruner.surgery.mask import mask, mask_elements, mask_group, unmask, update_tensors
from sspruner.surgery.proof import slice_with_proof

PROMPT_TOKENS, NEW_TOKENS = 24, 40


def prune(
    model: nn.Module,
    scorer: OneScorer | None = None,
    *,
    basis: str | None = None,
    axis: str | Mapping[str, float] = "state",
    sparsity: float | None = None,
    keep: int | None = None,
    allocation: str = "uniform",
    multiple_of: int = 1,
    ratios: Mapping[str, float] | None = None,
    ignore: Sequence[str] = (),
    pattern: str | None = None,
    granularity: str | None = None,
    rows: Sequence[str] = (),
    normalise: str | None = None,
    floor: Mapping[str, int] | None = None,
    cap: Mapping[str, int] | None = None,
    limits: Limits | None = None,
    target: str | None = None,
    tp: int = 1,
    mode: str = "slice",
    one_shot: bool = False,
    refit: str = "none",
    calibration: Source = "self",
    samples: int = 32,
    seq_len: int = 256,
    tokenizer: Any = None,
    options: dict[str, Any] | None = None,
    device: str | None = None,
    seed: int = 0,
    cache: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Prune `model` in place: score, plan and cut layer by layer, each layer on inputs made by the cut ones before it.

    scorer, basis: what decides, and in which coordinates of the state; one of them is enough. The default is "ghost",
    which keeps coordinates ("select"); basis="balanced" keeps directions (docs/balanced.md). "auto" takes the scorer
    that costs least at this very cut, on calibration text (docs/budgets.md).
    axis: what to remove; several at once with the fraction of each, {"state": 0.5, "head": 0.25}, in one plan with one
    proof. For one axis, sparsity (fraction removed, default 0.5) or keep (units left in every set) is the budget, or
    limits are, in users' units (docs/budgets.md); ratios (pattern -> fraction), ignore (patterns), floor and cap
    (pattern -> units) say where it differs, allocation and normalise how layers share it (docs/allocation.md). On the
    axes of single elements pattern ("2:4"), granularity and rows say which elements compete. With one_shot, all layers
    are scored on the dense model and cut at once; so it is where layers or scorers compete, and where a limit of damage
    has to be met. With a target, all sizes are such as this runtime takes, over tp GPUs (docs/targets.md). refit
    "output" or "bias" then solves for what stays on the calibration text, in closed form (docs/refit.md). mode "slice"
    makes tensors smaller after a proof that this equals the mask; "mask" stops at the mask. resume: go on with the
    interrupted run on an offloaded model (docs/offload.md), of which such a run may leave a part in its folder. The
    other arguments are those of `score` and `plan`.

    Sequential scoring: Menezes & Kyrillidis, GHOST, arXiv 2602.11408. Raises InputError for bad arguments and for a
    budget that removes nothing, ModelError where the target cannot take the cut, PluginError for a scorer that breaks
    its contract, ProofError if the cut is not what the plan predicts.
    """
    if mode not in ("slice", "mask"):
        raise InputError(f"mode {mode!r}: must be slice or mask")
    if refit not in KINDS:
        raise InputError(f"refit {refit!r}: must be one of {', '.join(KINDS)}")
    if refit == "bias" and limits is not None and (limits.parameters or limits.memory):
        raise InputError("refit bias adds parameters, which limits do not foresee: use refit output")
    budget = make_budget(
        axis, sparsity, keep, allocation, multiple_of, ratios, ignore, pattern, granularity, rows, normalise, floor,
        cap, limits,
    )  # fmt: skip
    axes = [axis] if isinstance(axis, str) else list(axis)
    asked = scorers_asked(scorer, basis, axes)
    run = Run(model, asked, axes, options, seed, device, tolerant=len(asked) > 1)
    by_axis = run.granularity
    if fit := fit_to(run.graph, target, tp):
        check_asked(fit.target, budget, refit, run.has_basis)
        budget = replace(budget, fit=fit)
        check_cut(model, trial(run.graph, allocate(run.groups, budget)), run.graph, fit.target)
    lines = rounded(run.groups, budget) if limits is None else []  # limits settle on sizes that the target takes
    one_shot = one_shot or len(run.jobs) > 1 or budget.compares_layers(run.groups, by_axis)
    by_blocks = offloaded(model) is not None
    if by_blocks:
        check_offloaded(run, budget, limits, mode, refit, calibration)
    elif resume:
        raise InputError("resume goes on with a run on an offloaded model: load it with offload")
    if limits is None:
        check_budget(run.groups, budget)
    elif not (one_shot or limits.of_damage or run.has_basis or any(group.blocks for group in run.groups.values())):
        budget = replace(budget, sparsity=fraction_of_size(model, run.graph, run.groups, budget, limits))
    else:
        one_shot = True
    choose = {} if one_shot else choosers(run.groups, budget, by_axis)
    dense = model_size(model, run.graph)
    clock = _Clock()
    with on_device(model, run.device), clock("calibration"):
        data = calibrated(calibration, model, tokenizer, samples, seq_len, seed, progress)
    if refit != "none":
        check_calibration(model, run.graph, run.groups, refit, data)
    journal = journal_for(run, budget, data, one_shot, resume) if by_blocks else None
    prompt = data.held_out[0][data.held_out_mask[0]][:PROMPT_TOKENS]
    kept: dict[str, torch.Tensor] = {}
    updates: dict[str, torch.Tensor] = {}

    def decide(importance: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        changed: dict[str, torch.Tensor] = {}
        for name, scored in importance.items():
            kept[name], new = run.reduce(run.groups[name], scored, choose[name])
            twice = next((tensor for tensor in new if tensor in updates or tensor in changed), None)
            if twice:
                raise InputError(f"{twice}: changed by the scorers of two axes; prune one after the other")
            changed |= {tensor: _as_stored(model, tensor, value) for tensor, value in new.items()}
        updates.update(changed)
        return changed

    def cut(importance: dict[str, torch.Tensor]) -> None:
        update_tensors(model, decide(importance))  # before the masks: new values are of whole tensors
        for name in importance:
            group = run.groups[name]
            if group.tensor:
                mask_elements(model, group, kept[name])
            else:
                mask_group(model, group, reduction(kept[name], run.bases.get(name)))

    with clock("scoring"):
        try:
            if one_shot:
                found = score_dense(run, data, cache, progress, journal)
            else:
                found = walk(run, data, cut=cut, progress=progress, journal=journal)
        finally:
            unmask(model)
    search: dict[str, Any] = {"limits": limits.to_json()} if limits else {}
    curves = None
    if one_shot:
        with clock("search"), on_device(model, run.device):
            settled = from_one(lambda: settle(model, run.graph, run.groups, found, budget, limits, data, progress))
        run.jobs = [job for job in run.jobs if job.label == settled.label]
        budget, curves, search = settled.budget, settled.curves, search | settled.evidence
        if run.refused:
            search["scorers"] = search.get("scorers", {}) | run.refused
    scores = found[run.jobs[0].label]
    choose = choosers(run.groups, budget, run.granularity, compared(scores, budget), curves)
    decide({name: scores.importance[name] for name in run.groups if name not in kept})
    made = make_plan(run.groups, kept, updates, scores, budget)
    check_plan(made, run.graph, model=model)  # what whole modules may not go is known only now
    plans, errors = {"cut": made}, {}
    if refit != "none":
        with clock("refit"):
            refitted = refit_plan(model, made, refit, calibration=data, device=device, progress=progress)
        plans, errors = plans | {"refitted": refitted.plan}, refitted.errors
    one_size = None
    if not by_blocks:
        one_size = same_size(made, run.graph, multiple_of, lambda keep: plan(run.graph, scores, keep=keep))
        plans |= {"one size": one_size} if one_size else {}
    made = plans.get("refitted", made)
    if fit:
        check_cut(model, made, run.graph, fit.target)

    # mamba_ssm's generate is another; an offloaded model would be read once for every token
    speaks = tokenizer is not None and hasattr(model, "generation_config") and not by_blocks
    said = says = proof = None
    if journal:
        with clock("evaluation and proof"), quick_on_cpu(model, run.device):
            cost, proof = cut_by_blocks(
                model, made, run.graph, data, device=run.device, seed=seed, journal=journal, progress=progress
            )
        costs = {"cut": cost}
    else:
        with on_device(model, run.device):
            said = continuation(model, tokenizer, prompt, NEW_TOKENS) if speaks else None
            with clock("evaluation"):
                found_costs = damages(model, list(plans.values()), run.graph, data.held_out_batches())
        costs = dict(zip(plans, found_costs, strict=True))
    if one_size:
        kept_by_all = next(iter(one_size.groups.values())).after
        search["one_size"] = {"kept": kept_by_all, **measured(costs["one size"])}
    if not by_blocks:
        with on_device(model, run.device):
            with clock("proof"):
                proof = slice_with_proof(model, made, run.graph, seed) if mode == "slice" else None
            if mode == "mask":
                mask(model, made, run.graph)
            says = continuation(model, tokenizer, prompt, NEW_TOKENS) if speaks else None
    cut_graph = trace(model)
    report = Report(
        scorer=run.jobs[0].label,
        basis=", ".join(dict.fromkeys(cls.basis for cls, _ in run.jobs[0].scorers.values())),
        options=run.jobs[0].options,
        axis=", ".join(run.axes),
        budget=budget.to_json(),
        mode=mode,
        one_shot=one_shot,
        calibration={
            "source": data.source,
            "sequences": len(data.tokens),
            "seq_len": data.tokens.shape[1],
            "tokens": int(data.mask.sum()),
            "held_out_tokens": int(data.held_out_mask.sum()),
            "held_out_is_separate": data.held_out_is_separate,
        },
        dense=dense | {"perplexity": costs["cut"].dense_perplexity},
        pruned=model_size(model, cut_graph) | measured(costs.get("refitted", costs["cut"])),
        layers={
            name: {"before": group.units, "after": int(kept[name][0].sum())}
            for name, group in run.groups.items()
            if not group.tensor
        },
        proof=proof,
        refit={"kind": refit, "without": measured(costs["cut"]), "errors": errors} if errors else {},
        search=search,
        target={**fit.to_json(), "rounded": lines, "notes": fit.target.notes(cut_graph)} if fit else {},
        sparsity=sparsity_of(model, cut_graph, run.axes),
        continuation={"prompt": tokenizer.decode(prompt, skip_special_tokens=True), "dense": said, "pruned": says}
        if speaks
        else None,
        seconds=clock.seconds,
        peak_memory_bytes=peak_memory_bytes(),
        seed=seed,
        versions=versions(),
        base_model=hub_name(model),
    )
    return Result(model, made, scores, report)


def _as_stored(model: nn.Module, name: str, value: torch.Tensor) -> torch.Tensor:
    """A new value in the dtype in which the model holds the parameter; a new bias is held as the weight is."""
    held = dict(model.named_parameters(remove_duplicate=False))
    like = held.get(name, held.get(name.removesuffix("bias") + "weight"))
    return value if like is None else value.to(like.dtype)


class _Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = round(time.perf_counter() - start, 3)
