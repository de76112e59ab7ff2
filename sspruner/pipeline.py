"""The main job: score, plan and cut, layer by layer; then prove the cut and measure what it cost."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sspruner
from sspruner.calibrate.replay import Replay, within
from sspruner.calibrate.sources import Calibration, Progress, calibration
from sspruner.calibrate.view import SSMView
from sspruner.errors import InputError, PlanError
from sspruner.evaluate.continuation import continuation
from sspruner.evaluate.damage import damage
from sspruner.graph.fingerprint import fingerprint
from sspruner.graph.group import DependencyGroup
from sspruner.graph.ssm_graph import SSMGraph, trace
from sspruner.io.load import check_finite
from sspruner.planning.allocate import allocate, budget, plan, select
from sspruner.planning.plan import Plan
from sspruner.planning.scores import Scores
from sspruner.plugins import manager
from sspruner.plugins.scorer import Scorer, check_scorer_class, checked_importance, make_scorer
from sspruner.plugins.scorer import observe as observe_layer
from sspruner.report.result import Report, model_size, peak_memory_bytes, versions
from sspruner.surgery.mask import is_masked, mask, mask_group, unmask
from sspruner.surgery.proof import slice_with_proof

TOKENS_PER_BATCH = 4096  # tokens that go through one block at a time
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
    scorer: str | type[Scorer] = "ghost",
    *,
    calibration: Source = "self",
    samples: int = 32,
    seq_len: int = 256,
    tokenizer: Any = None,
    axis: str = "state",
    options: dict[str, Any] | None = None,
    device: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Scores:
    """Score every unit of `axis` on the dense model, in one pass over its layers. The model is not changed.

    scorer: the name of an installed scorer, or a Scorer subclass; options are its constructor's arguments.
    calibration: anything that `sspruner.calibration` takes, with samples and seq_len, or its result. Scorers that
    need weights only ignore it.
    Raises InputError for an unknown scorer, axis or option, PluginError if the scorer breaks its contract.
    """
    run = _Run(model, scorer, axis, options, seed, device)
    if run.scorer.needs == "weights":
        data = None
    else:
        with on_device(model, run.device):
            data = _calibrated(calibration, model, tokenizer, samples, seq_len, seed, progress)
    return run.walk(data, cut=None, progress=progress)


def prune(
    model: nn.Module,
    scorer: str | type[Scorer] = "ghost",
    *,
    sparsity: float | None = None,
    keep: int | None = None,
    axis: str = "state",
    allocation: str = "uniform",
    multiple_of: int = 1,
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

    sparsity (fraction removed, default 0.5) or keep (units left in every set) is the budget. With one_shot, all
    layers are scored on the dense model and cut at once. mode "slice" makes tensors smaller after a proof that
    this equals the mask; "mask" stops at the mask. The other arguments are those of `score` and `plan`.

    Sequential scoring: Menezes & Kyrillidis, GHOST, arXiv 2602.11408. Raises InputError for bad arguments,
    PluginError for a scorer that breaks its contract, ProofError if the cut is not what the plan predicts.
    """
    if sparsity is None and keep is None:
        sparsity = 0.5
    if mode not in ("slice", "mask"):
        raise InputError(f"mode {mode!r}: must be slice or mask")
    run = _Run(model, scorer, axis, options, seed, device)
    counts = allocate(run.groups, sparsity=sparsity, keep=keep, allocation=allocation, multiple_of=multiple_of)
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
    budget_of = {"sparsity": sparsity, "keep": keep, "allocation": allocation, "multiple_of": multiple_of}
    made = plan(run.graph, scores, **budget_of)  # type: ignore[arg-type]

    with on_device(model, run.device):
        speaks = tokenizer is not None
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
        scorer=run.scorer.name,
        options=run.options,
        axis=axis,
        budget=budget(sparsity, keep, allocation, multiple_of),
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
        layers={name: {"before": s.before, "after": s.after} for name, s in made.groups.items()},
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


class _Run:
    """One scorer on one axis of one model: what `score` and `prune` share."""

    def __init__(
        self,
        model: nn.Module,
        scorer: str | type[Scorer],
        axis: str,
        options: dict[str, Any] | None,
        seed: int,
        device: str | None,
    ) -> None:
        if isinstance(scorer, str):
            self.scorer, self.plugin = manager.scorer(scorer)
        else:
            self.scorer, self.plugin = scorer, getattr(scorer, "__module__", "?")
            check_scorer_class(scorer, self.plugin)
        if axis not in self.scorer.axes:
            raise InputError(f"scorer {self.scorer.name!r} does not score axis {axis!r}; it scores "
                             f"{', '.join(sorted(self.scorer.axes))}")  # fmt: skip
        if is_masked(model):
            raise PlanError("the model is masked; call sspruner.unmask(model) first")
        self.model, self.axis, self.options, self.seed = model, axis, options or {}, seed
        check_finite(model)
        self.graph: SSMGraph = trace(model)
        self.groups = self.graph.on_axis(axis)
        self.device = resolve_device(device)
        self.make()  # wrong options fail here, before any work

    def make(self) -> Scorer:
        return make_scorer(self.scorer, axis=self.axis, seed=self.seed, options=self.options)

    def walk(
        self,
        data: Calibration | None,
        cut: Callable[[DependencyGroup, torch.Tensor], None] | None,
        progress: Progress | None,
    ) -> Scores:
        """Score every dependency group in layer order; `cut`, if given, is applied before the next layer's inputs."""
        name_of_model = fingerprint(self.model)
        replay = None
        if self.scorer.needs == "activations" and data is not None:
            per_batch = max(1, TOKENS_PER_BATCH // data.tokens.shape[1])
            replay = Replay(self.model, self.graph, data.batches(per_batch), self.device)
        importance: dict[str, torch.Tensor] = {}
        groups = {g.layer: g for g in self.groups.values()}
        scorers = {path: self.make() for path in groups}
        layers = {layer.path: layer for layer in self.graph.layers if layer.path in groups}

        def observe(path: str, hidden: torch.Tensor | None, observed: torch.Tensor) -> None:
            mixer = self.model.get_submodule(path)
            observe_layer(scorers[path], SSMView(layers[path], groups[path], mixer, hidden, observed), self.plugin)

        def finish(path: str) -> None:
            group = groups[path]
            importance[group.name] = checked_importance(scorers.pop(path), group, self.plugin)
            if cut:
                cut(group, importance[group.name])

        if replay is None:
            for path in groups:
                observe(path, None, torch.ones(0, 0, dtype=torch.bool))
                finish(path)
        else:
            for done, block in enumerate(replay.blocks):
                if progress:
                    progress(f"scoring {block}", done, len(replay.blocks))
                replay.observe(block, observe)
                for path in [p for p in groups if within(p, block)]:
                    finish(path)
                if block != replay.blocks[-1]:
                    replay.advance(block)
            if progress:
                progress("scoring", len(replay.blocks), len(replay.blocks))
        return Scores(importance, self._metadata(name_of_model, data, sequential=cut is not None))

    def _metadata(self, model: str, data: Calibration | None, sequential: bool) -> dict[str, str]:
        used = data if self.scorer.needs == "activations" else None
        return {
            "sspruner": sspruner.__version__,
            "scorer": self.scorer.name,
            "options": json.dumps(self.options, sort_keys=True),
            "model": model,
            "sequential": str(sequential).lower(),
            "calibration": used.source if used else "",
            "tokens": str(int(used.mask.sum())) if used else "0",
            "seed": str(self.seed),
        }


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


def resolve_device(device: str | None) -> torch.device:
    """The compute device: the one named, else CUDA if there is one, else the CPU. Raises InputError for no device."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r}: not available here ({str(error).splitlines()[0]})") from error
    return found


@contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The whole model on `device` inside the block, and back where it was after it."""
    home = next(model.parameters()).device
    model.to(device)
    try:
        yield
    finally:
        model.to(home)
