"""The main job: score, plan and cut, layer by layer; then prove the cut and measure what it cost."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sspruner.calibrate.sources import Calibration, Progress, calibration
from sspruner.errors import InputError
from sspruner.evaluate.continuation import continuation
from sspruner.evaluate.damage import damage
from sspruner.graph.group import DependencyGroup
from sspruner.graph.ssm_graph import trace
from sspruner.planning.allocate import Budget, allocate, make_plan, select
from sspruner.planning.plan import Plan, check_plan
from sspruner.planning.scores import Scores
from sspruner.plugins.scorer import Scorer
from sspruner.report.result import Report, model_size, peak_memory_bytes, versions
from sspruner.surgery.mask import mask, mask_group, unmask
from sspruner.surgery.proof import slice_with_proof
from sspruner.walk import TOKENS_PER_BATCH, Run, on_device

PROMPT_TOKENS, NEW_TOKENS = 24, 40

Source = Calibration | str | Path | list[str] | torch.Tensor


@dataclass(frozen=True)
class Result:
    """What `prune` returns: the model (the one given, cut in place), how it was cut, and what that cost."""

    model: nn.Module
    plan: Plan
    scores: Scores
    report: Report

    def named(self, model: str, command: str) -> Result:
        """The same result; its report says how the model was called and the command that ran."""
        return replace(self, report=replace(self.report, model=model, command=command))


def score(
    model: nn.Module,
    scorer: str | type[Scorer] | Mapping[str, str] = "ghost",
    *,
    calibration: Source = "self",
    samples: int = 32,
    seq_len: int = 256,
    tokenizer: Any = None,
    axis: str | Sequence[str] = "state",
    options: dict[str, Any] | None = None,
    device: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Scores:
    """Score every unit of one axis or several on the dense model, in one pass over its layers. It is not changed.

    scorer: the name of an installed scorer, a Scorer subclass, or a name for each axis; options are its constructor's
    arguments. calibration: anything that `sspruner.calibration` takes, with samples and seq_len, or its result. Scorers
    that need weights only ignore it.
    Raises InputError for an unknown scorer, axis or option, PluginError if the scorer breaks its contract.
    """
    run = Run(model, scorer, [axis] if isinstance(axis, str) else list(axis), options, seed, device)
    data = None
    if run.needs_data:
        with on_device(model, run.device):
            data = _calibrated(calibration, model, tokenizer, samples, seq_len, seed, progress)
    return run.walk(data, cut=None, progress=progress)


def prune(
    model: nn.Module,
    scorer: str | type[Scorer] | Mapping[str, str] = "ghost",
    *,
    axis: str | Mapping[str, float] = "state",
    sparsity: float | None = None,
    keep: int | None = None,
    allocation: str = "uniform",
    multiple_of: int = 1,
    ratios: Mapping[str, float] | None = None,
    ignore: Sequence[str] = (),
    mode: str = "slice",
    one_shot: bool = False,
    calibration: Source = "self",
    samples: int = 32,
    seq_len: int = 256,
    tokenizer: Any = None,
    options: dict[str, Any] | None = None,
    device: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """Prune `model` in place: score, plan and cut layer by layer, each layer on inputs made by the cut ones before it.

    axis: what to remove; several at once with the fraction of each, {"state": 0.5, "head": 0.25}, in one plan with one
    proof. For one axis, sparsity (fraction removed, default 0.5) or keep (units left in every set) is the budget;
    ratios (pattern -> fraction) and ignore (patterns) say where it differs. With one_shot, all layers are scored on
    the dense model and cut at once. mode "slice" makes tensors smaller after a proof that this equals the mask; "mask"
    stops at the mask. The other arguments are those of `score` and `plan`.

    Sequential scoring: Menezes & Kyrillidis, GHOST, arXiv 2602.11408. Raises InputError for bad arguments and for a
    budget that removes nothing, PluginError for a scorer that breaks its contract, ProofError if the cut is not what
    the plan predicts.
    """
    if mode not in ("slice", "mask"):
        raise InputError(f"mode {mode!r}: must be slice or mask")
    budget = make_budget(axis, sparsity, keep, allocation, multiple_of, ratios, ignore)
    run = Run(model, scorer, [axis] if isinstance(axis, str) else list(axis), options, seed, device)
    counts = allocate(run.groups, budget)
    if all(counts[name] == group.units for name, group in run.groups.items()):
        raise InputError("the budget removes nothing: every dependency group keeps all its units")
    dense = model_size(model, run.graph)
    clock = _Clock()
    with on_device(model, run.device), clock("calibration"):
        data = _calibrated(calibration, model, tokenizer, samples, seq_len, seed, progress)
    prompt = data.held_out[0][data.held_out_mask[0]][:PROMPT_TOKENS]

    def cut(group: DependencyGroup, importance: torch.Tensor) -> None:
        mask_group(model, group, select(importance, counts[group.name]))

    with clock("scoring"):
        try:
            scores = run.walk(data, cut=None if one_shot else cut, progress=progress)
        finally:
            unmask(model)
    made = make_plan(run.graph, scores, budget)
    check_plan(made, run.graph)  # what whole modules may not go is known only now

    with on_device(model, run.device):
        speaks = tokenizer is not None and hasattr(model, "generation_config")  # mamba_ssm's generate is another
        said = continuation(model, tokenizer, prompt, NEW_TOKENS) if speaks else None
        with clock("evaluation"):
            per_batch = max(1, TOKENS_PER_BATCH // 2 // data.held_out.shape[1])
            cost = damage(model, made, run.graph, data.held_out_batches(per_batch))
        with clock("proof"):
            proof = slice_with_proof(model, made, run.graph, seed) if mode == "slice" else None
        if mode == "mask":
            mask(model, made, run.graph)
        says = continuation(model, tokenizer, prompt, NEW_TOKENS) if speaks else None
    report = Report(
        scorer=run.label,
        options=run.options,
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
        dense=dense | {"perplexity": cost.dense_perplexity},
        pruned=model_size(model, trace(model)) | {"perplexity": cost.pruned_perplexity, "kl_to_dense": cost.kl},
        layers={
            name: {"before": group.units, "after": made.groups[name].after if name in made.groups else group.units}
            for name, group in run.groups.items()
        },
        proof=proof,
        continuation={"prompt": tokenizer.decode(prompt, skip_special_tokens=True), "dense": said, "pruned": says}
        if speaks
        else None,
        seconds=clock.seconds,
        peak_memory_bytes=peak_memory_bytes(),
        seed=seed,
        versions=versions(),
    )
    return Result(model, made, scores, report)


def make_budget(
    axis: str | Mapping[str, float],
    sparsity: float | None = None,
    keep: int | None = None,
    allocation: str = "uniform",
    multiple_of: int = 1,
    ratios: Mapping[str, float] | None = None,
    ignore: Sequence[str] = (),
) -> Budget:
    """The arguments of `prune` as a Budget. Raises InputError for fractions given twice, or that make no sense."""
    if isinstance(axis, str):
        sparsity = 0.5 if sparsity is None and keep is None else sparsity
        return Budget(sparsity, keep, allocation, multiple_of, ratios or {}, ignore)
    if sparsity is not None or keep is not None:
        raise InputError("every axis has its own fraction; leave out sparsity and keep, or name one axis alone")
    return Budget(axis, None, allocation, multiple_of, ratios or {}, ignore)


class _Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = round(time.perf_counter() - start, 3)


def _calibrated(
    source: Source,
    model: nn.Module,
    tokenizer: Any,
    samples: int,
    seq_len: int,
    seed: int,
    progress: Progress | None,
) -> Calibration:
    if isinstance(source, Calibration):
        return source
    return calibration(source, model, tokenizer, samples=samples, seq_len=seq_len, seed=seed, progress=progress)
