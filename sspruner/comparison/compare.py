"""Compare: several scorers, several cuts, one pass of scoring, one held-out text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from torch import nn

from sspruner.budgets.decide import plan
from sspruner.budgets.resolve import resolve_budget
from sspruner.calibrate.sources import Progress
from sspruner.comparison.record import Comparison, Cut, row_from_json, row_to_json
from sspruner.compute.device import on_device, resolve_device
from sspruner.compute.forward import embedding
from sspruner.compute.quick import quick_on_cpu
from sspruner.errors import InputError, PlanError
from sspruner.evaluation.last_word import Passage
from sspruner.evaluation.measures import Asked, Values, check_metrics, measure, questions, summary
from sspruner.evaluation.paired import Interval
from sspruner.files import strict_json
from sspruner.files.output import atomic_file, check_results
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.graph.trace import trace
from sspruner.plans.plan import Plan, check_plan
from sspruner.recipes.parts import CalibrationText
from sspruner.recipes.recipe import Recipe
from sspruner.scoring.cache import cache_key
from sspruner.scoring.job import OneScorer
from sspruner.scoring.score import Source, calibrated, score
from sspruner.scoring.scores import Scores
from sspruner.surgery.mask import masked
from sspruner.surgery.sizes import sizes

SPARSITIES = (0.25, 0.5, 0.75, 0.9)
ROWS = ".rows"  # in the folder of a comparison: the rows that are finished
MARKS = ("compare.json", ROWS)  # a folder with one of these is one

Cells = dict[float, Cut | str]  # of one scorer: sparsity -> the cut, or why it cannot be made


def compare(
    model: nn.Module,
    scorers: Sequence[OneScorer],
    *,
    sparsities: Sequence[float] = SPARSITIES,
    metrics: Sequence[str] = ("ppl", "kl"),
    axis: str = "state",
    allocation: str = "uniform",
    multiple_of: int = 1,
    ratios: Mapping[str, float] | None = None,
    ignore: Sequence[str] = (),
    normalise: str | None = None,
    calibration: Source = "self",
    samples: int = 32,
    seq_len: int = 256,
    tokenizer: Any = None,
    passages: Sequence[Passage] = (),
    baseline: nn.Module | None = None,
    options: dict[str, Any] | None = None,
    device: str | None = None,
    seed: int = 0,
    cache: bool = False,
    out: str | Path | None = None,
    progress: Progress | None = None,
    on_row: Callable[[Comparison], None] | None = None,
) -> Comparison:
    """Score with all scorers in one pass over the dense model, plan every cut of each, and measure them all, masked, on
    the held-out text. The model is left as it was, and is in memory once.

    metrics: "ppl" and "kl", which come together, of the held-out text; "lambada", of passages (last_word.passages);
    "recall", of sequences made with the seed. Every other argument is one of `score` and `plan`.
    baseline: a smaller dense model with the same vocabulary, measured on the same tokens.
    out: a folder for each scorer's scores and finished row: a later call there takes the rows of which nothing has
    changed since. The result's `save` writes its tables there. on_row: called with what is known after every row.
    Scorers that also change weights are compared by their selection alone. Raises InputError for bad arguments; a cut
    that a scorer cannot make is a cell with the reason.
    """
    if not scorers or not sparsities:
        raise InputError("compare: name at least one scorer and one sparsity")
    if allocation == "adaptive":
        raise InputError("compare: allocation adaptive measures the layers of one scorer; use prune for each")
    for sparsity in sparsities:  # what makes no sense fails before any work
        resolve_budget(
            Recipe.of(
                axis=axis,
                sparsity=sparsity,
                allocation=allocation,
                multiple_of=multiple_of,
                ratios=ratios,
                ignore=ignore,
                normalise=normalise,
            )
        )
    check_metrics(metrics, bool(passages))
    _check_baseline(model, baseline)
    folder = None if out is None else check_results(out, MARKS)
    if folder is not None:
        for part in (ROWS, "scores"):
            (folder / part).mkdir(exist_ok=True)
    compute = resolve_device(device)
    with on_device(model, compute):
        data = calibrated(
            calibration, model, tokenizer, CalibrationText(samples=samples, seq_len=seq_len), seed, progress
        )
    scores = score(
        model, list(scorers), calibration=data, axis=axis, options=options, device=device, seed=seed, cache=cache,
        progress=progress,
    )  # fmt: skip
    graph = trace(model)
    budget: dict[str, Any] = {
        "allocation": allocation,
        "multiple_of": multiple_of,
        "ratios": ratios,
        "ignore": ignore,
        "normalise": normalise,
    }
    plans = _planned(model, graph, scores, sparsities, budget)
    asked = questions(model, list(data.held_out_batches()), metrics, passages, seed)
    key = cache_key(
        model, [type(site.family) for site in graph.layers],
        {"metrics": sorted(metrics), "passages": [asdict(p) for p in passages], "seed": seed, "device": compute.type,
         "axis": axis, "sparsities": list(sparsities), **budget},
        data.held_out, data.held_out_mask,
    )  # fmt: skip
    with on_device(model, compute), quick_on_cpu(model, compute):
        (dense,) = measure(model, [lambda: nullcontext(model)], asked)
        found = Comparison(
            axis=axis,
            sparsities=tuple(sparsities),
            dense=_cut(model, graph, None, summary(dense, dense, seed)),
            cells={},
            from_cache=tuple(label for label, scored in scores.items() if scored.from_cache),
            calibration={
                "source": data.source,
                "tokens": int(data.mask.sum()),
                "held_out_tokens": int(data.held_out_mask.sum()),
                "held_out_is_separate": data.held_out_is_separate,
            },
            seed=seed,
        )
        if baseline is not None:
            with on_device(baseline, compute), quick_on_cpu(baseline, compute):
                (values,) = measure(model, [lambda: nullcontext(baseline)], asked)
            found = replace(found, baseline=_cut(baseline, trace(baseline), None, summary(values, dense, seed)))
        for label, row in plans.items():
            file, row_key = _kept_row(folder, label, scores[label], key)
            cells = file and _read(file, row_key)
            if not cells:
                named = partial(_named, progress, label) if progress else None
                cells = _measured(model, graph, row, asked, dense, named)
                if file:
                    with atomic_file(file) as temporary:
                        temporary.write_text(strict_json.dumps({"key": row_key, "cells": row_to_json(cells)}))
            found = replace(found, cells=found.cells | {label: cells})
            if on_row:
                on_row(found)
    return found


def _planned(
    model: nn.Module, graph: SSMGraph, scores: Mapping[str, Scores], sparsities: Sequence[float], budget: dict[str, Any]
) -> dict[str, dict[float, Plan | str]]:
    """Every scorer's plan for every fraction, or why there is none. Raises InputError if there is none at all."""
    plans: dict[str, dict[float, Plan | str]] = {label: {} for label in scores}
    for label, scored in scores.items():
        for sparsity in sparsities:
            try:
                made = plan(graph, scored, sparsity=sparsity, **budget)
                check_plan(made, graph, model=model)
                plans[label][sparsity] = made
            except (InputError, PlanError) as error:  # PlanError: whole modules that have to stay
                plans[label][sparsity] = str(error)
    found = [made for row in plans.values() for made in row.values()]
    if all(isinstance(made, str) for made in found):
        raise InputError(str(found[0]))
    return plans


def _kept_row(folder: Path | None, label: str, scores: Scores, key: str | None) -> tuple[Path | None, str]:
    """The file of a finished row, None where there can be none, and what it has to be of. Its scores are written."""
    if folder is None:
        return None, ""
    name = quote(label, safe="")
    scores.save(folder / "scores" / f"{name}.safetensors")
    own = hashlib.sha256(f"{key} {_digest(scores)}".encode()).hexdigest()
    return (folder / ROWS / f"{name}.json" if key else None), own


def _measured(
    model: nn.Module, graph: SSMGraph, row: dict[float, Plan | str], asked: Asked, dense: Values,
    progress: Progress | None,
) -> Cells:  # fmt: skip
    """One scorer's cuts, measured together; what could not be planned stays the reason."""
    plans = {sparsity: made for sparsity, made in row.items() if isinstance(made, Plan)}
    values = measure(model, [partial(masked, model, made, graph) for made in plans.values()], asked, progress)
    cuts = {
        sparsity: _cut(model, graph, made, summary(own, dense, asked.seed))
        for (sparsity, made), own in zip(plans.items(), values, strict=True)
    }
    return {sparsity: cuts.get(sparsity, str(made)) for sparsity, made in row.items()}


def _cut(model: nn.Module, graph: SSMGraph, made: Plan | None, measures: dict[str, Interval]) -> Cut:
    size = sizes(model, graph, made)
    kept = {name: reduction.after for name, reduction in made.groups.items()} if made else {}
    return Cut(measures, size.state_bytes, size.parameters, kept)


def _check_baseline(model: nn.Module, baseline: nn.Module | None) -> None:
    if baseline is not None:
        wanted, has = (embedding(m).num_embeddings for m in (model, baseline))
        if wanted != has:
            raise InputError(f"baseline: has {has:,} tokens in its vocabulary and the model {wanted:,}; a baseline "
                             "reads the same tokens")  # fmt: skip


def _digest(scores: Scores) -> str:
    digest = hashlib.sha256()
    bases = {f"{name}.{i}": part for name, basis in scores.bases.items() for i, part in enumerate(basis)}
    for name, tensor in sorted((scores.importance | bases).items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read(file: Path, key: str) -> Cells | None:
    """A finished row, if it is of the same model, scores, text and arguments. What cannot be read is made again."""
    try:
        data = strict_json.loads(file.read_text(encoding="utf-8"))
        return row_from_json(data["cells"]) if data["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _named(progress: Progress, label: str, phase: str, done: int, total: int) -> None:
    progress(f"{phase} {label}", done, total)
