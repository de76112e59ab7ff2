"""Compare: several scorers and several cuts, with one pass of scoring, on one held-out text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import nn

from sspruner.budgets.decide import plan
from sspruner.calibrate.sources import Calibration, Progress, check_held_out
from sspruner.comparison.record import Comparison, Cut, row_from_json, row_to_json
from sspruner.comparison.values import MARKS, ROWS, check_values
from sspruner.compute.device import on_device, resolve_device
from sspruner.compute.forward import check_predicts_tokens, embedding
from sspruner.compute.quick import quick_on_cpu
from sspruner.compute.settings import undisturbed
from sspruner.errors import InputError, PlanError
from sspruner.evaluation.last_word import Passage, passages, read_passages
from sspruner.evaluation.measures import Inputs, Values, inputs_for, measure, summary
from sspruner.evaluation.paired import Interval
from sspruner.files import strict_json
from sspruner.files.output import check_results, write_file
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.graph.trace import trace
from sspruner.plans.plan import Plan, check_plan
from sspruner.pruning.prepare import texts
from sspruner.pruning.reconstruct import check_axes
from sspruner.pruning.refit import refit
from sspruner.recipes.common import FILE, recipe_or_short
from sspruner.recipes.compare import CompareRecipe
from sspruner.scoring.cache import cache_key
from sspruner.scoring.choice import DEFAULT
from sspruner.scoring.known import find_scorer, installed_scorers
from sspruner.scoring.score import Source, score
from sspruner.scoring.scores import Scores
from sspruner.surgery.mask import masked
from sspruner.surgery.sizes import sizes

PASSAGES = 500  # LAMBADA passages, if a recipe names a file

Cells = dict[float, Cut | str]  # of one scorer: sparsity -> the cut, or the reason why it is impossible


@dataclass(frozen=True)
class Given:
    """Python objects that replace what a recipe names, and a callback.

    calibration   a source for `sspruner.calibration`, or a `Calibration`, instead of the recipe's source
    baseline      a smaller dense model with the same vocabulary
    passages      of LAMBADA (last_word.passages)
    on_row        called with the comparison so far after every row
    """

    calibration: Source | None = None
    baseline: nn.Module | None = None
    passages: Sequence[Passage] = ()
    on_row: Callable[[Comparison], None] | None = None


@undisturbed
def compare(
    model: nn.Module,
    recipe: Any = None,
    *,
    tokenizer: Any = None,
    device: str | None = None,
    cache: bool = False,
    out: str | Path | None = None,
    progress: Progress | None = None,
    **short: Any,
) -> Comparison:
    """Score with all scorers in one pass over the dense model, plan all cuts, and measure them all as masks.

    All cuts are measured on the same held-out text. The model is not changed, and is in memory once.

    Args:
        recipe: a `CompareRecipe`. Or scorers, with the fields of the recipe's parts as `short` arguments:
            `compare(model, ["ghost", "magnitude"], sparsities=(0.5,), axis="head")`. The metrics "ppl" and "kl" come
            together; "lambada" needs passages; the sequences of "recall" are drawn with the seed.
        tokenizer: tokenizer that reads text.
        device: the compute device; CUDA if there is one, else the CPU.
        cache: use cached scores (docs/calibration.md).
        out: a folder for the recipe, each scorer's scores and finished row. A later call with this folder reuses rows
            whose inputs have not changed. The result's `save` writes its tables there.
        progress: called with (phase, done, total).
        short: also the fields of `Given` (`calibration`, `baseline`, `passages`, `on_row`), with or without a recipe.

    Raises:
        InputError: for invalid arguments. A cut that a scorer cannot make is a cell with the reason.

    Scorers that also change weights are compared by their selection only.
    """
    recipe, given = _parse_arguments(recipe, short)
    check_predicts_tokens(model, "compare")
    given, seed = _prepared(model, recipe, given, tokenizer), recipe.method.seed
    folder = None if out is None else check_results(out, MARKS)
    compute = resolve_device(device)
    with on_device(model, compute):
        data, refit_text = _calibrated(model, recipe, given, tokenizer, progress)
    check_held_out(model, data, refit_text)
    if given.calibration is not None:
        recipe = replace(recipe, calibration=replace(recipe.calibration, source=data.source))
    if folder is not None:
        _prepare_folder(folder, recipe)
    scores = score(
        model, list(recipe.cells.scorers or ()), calibration=data, axis=recipe.axis,
        options=dict(recipe.method.options), device=device, seed=seed, cache=cache, progress=progress,
    )  # fmt: skip
    graph = trace(model)
    plans = _planned(model, graph, scores, recipe)
    inputs = inputs_for(model, list(data.held_out_batches()), recipe.cells.metrics, given.passages, seed)
    key = _key(model, graph, recipe, given, (data, refit_text), compute)
    with on_device(model, compute), quick_on_cpu(model, compute):
        (dense,) = measure(model, [lambda: nullcontext(model)], inputs)
        comparison = _without_rows(recipe, data, scores, _cut(model, graph, None, summary(dense, dense, inputs.seed)))
        if given.baseline is not None:
            comparison = replace(comparison, baseline=_measured_baseline(model, given.baseline, inputs, dense, compute))
        for label, row in plans.items():
            file, row_key = _row_file(folder, label, scores[label], key)
            cells = file and _read(file, row_key)
            if not cells:
                labelled = partial(_labelled, progress, label) if progress else None
                refitted = _refitted(model, row, recipe, refit_text, device, labelled)
                cells = _measured(model, graph, refitted, inputs, dense, labelled)
                if file:
                    write_file(file, strict_json.dumps({"key": row_key, "cells": row_to_json(cells)}))
            comparison = replace(comparison, cells=comparison.cells | {label: cells})
            if given.on_row:
                given.on_row(comparison)
    return comparison


def check_recipe(recipe: CompareRecipe, has_passages: bool = False) -> CompareRecipe:
    """Check everything that needs no model, and return the recipe with its scorers named.

    Raises InputError for an invalid recipe.
    """
    check_values(recipe, has_passages)
    if recipe.method.refit == "reconstruct":
        check_axes([recipe.axis])
    cells = recipe.cells
    scorers = _default_scorers(recipe.axis) if cells.scorers is None else cells.scorers
    for name in scorers:
        if isinstance(name, str):
            find_scorer(name)
    return replace(recipe, cells=replace(cells, scorers=tuple(scorers)))


def _parse_arguments(recipe: Any, short: dict[str, Any]) -> tuple[CompareRecipe, Given]:
    """Return the recipe, or one made from scorers and short arguments, and the objects given with it."""
    names = {f.name for f in fields(Given)}
    beside = {name: short.pop(name) for name in list(short) if name in names}
    given = Given(**{name: value for name, value in beside.items() if value is not None})
    if not isinstance(recipe, CompareRecipe):
        scorers = short.pop("scorers", None) if recipe is None else recipe
        return check_recipe(CompareRecipe.of(scorers, **short), bool(given.passages)), given
    return check_recipe(recipe_or_short(CompareRecipe, recipe, short), bool(given.passages)), given


def _default_scorers(axis: str) -> list[str]:
    """Return ghost, if it scores this axis, and all installed scorers that need only weights."""
    usable = {name: cls for name, (cls, _) in sorted(installed_scorers().items()) if axis in cls.axes}
    return [name for name, cls in usable.items() if name == DEFAULT or cls.needs == "weights"] or [DEFAULT]


def _prepared(model: nn.Module, recipe: CompareRecipe, given: Given, tokenizer: Any) -> Given:
    """Check the baseline, and read the passages that the recipe names."""
    if recipe.cells.baseline is not None and given.baseline is None:
        raise InputError(f"baseline {recipe.cells.baseline}: load it, and give the model as baseline=")
    _check_baseline(model, given.baseline)
    if recipe.cells.lambada is None or given.passages:
        return given
    if tokenizer is None:
        raise InputError(f"lambada {recipe.cells.lambada}: passages are text, and the model has no tokenizer; give one "
                         "with --tokenizer, or leave lambada out")  # fmt: skip
    texts = read_passages(recipe.cells.lambada)
    return replace(given, passages=tuple(passages(tokenizer, texts, PASSAGES, recipe.method.seed)))


def _calibrated(
    model: nn.Module, recipe: CompareRecipe, given: Given, tokenizer: Any, progress: Progress | None
) -> tuple[Calibration, Calibration]:
    """Return the text to score on, and the text of the refit."""
    text, method = recipe.calibration, recipe.method
    source = text.source if given.calibration is None else given.calibration
    return texts(source, model, tokenizer, (text, method.refit, recipe.reconstruction, method.seed), progress)


def _prepare_folder(folder: Path, recipe: CompareRecipe) -> None:
    for part in (ROWS, "scores"):
        (folder / part).mkdir(exist_ok=True)
    recipe.save(folder / FILE)


def _key(
    model: nn.Module,
    graph: SSMGraph,
    recipe: CompareRecipe,
    given: Given,
    data: tuple[Calibration, Calibration],
    device: torch.device,
) -> str | None:
    """Return the cache key of a row, without its scores: model, code, cuts, refit, metrics and held-out text."""
    settings, (scored, refit_text), kind = recipe.to_json(), data, recipe.method.refit
    fitted = hashlib.sha256(refit_text.tokens.numpy().tobytes() + refit_text.mask.numpy().tobytes()).hexdigest()
    of_refit = {"refit": [kind, asdict(recipe.reconstruction), fitted]} if kind != "none" else {}
    of_cuts = {key: settings.get(key) for key in ("remove", "budget")}
    of_metrics = {
        "metrics": sorted(recipe.cells.metrics),
        "passages": [asdict(passage) for passage in given.passages],
        "seed": recipe.method.seed,
        "device": device.type,
        "sparsities": list(recipe.cells.sparsities),
    }
    code = [type(site.family) for site in graph.layers]
    return cache_key(model, code, of_metrics | of_cuts | of_refit, scored.held_out, scored.held_out_mask)


def _without_rows(recipe: CompareRecipe, data: Calibration, scores: Mapping[str, Scores], dense: Cut) -> Comparison:
    """Return the comparison before the first row."""
    return Comparison(
        axis=recipe.axis,
        sparsities=tuple(map(float, recipe.cells.sparsities)),
        dense=dense,
        cells={},
        from_cache=tuple(label for label, scored in scores.items() if scored.from_cache),
        calibration={
            "source": data.source,
            "tokens": int(data.mask.sum()),
            "held_out_tokens": int(data.held_out_mask.sum()),
            "held_out_is_separate": data.held_out_is_separate,
        },
        seed=recipe.method.seed,
        recipe=recipe,
    )


def _measured_baseline(
    model: nn.Module, baseline: nn.Module, inputs: Inputs, dense: Values, device: torch.device
) -> Cut:
    """Measure a smaller dense model on the same tokens, against the model."""
    with on_device(baseline, device), quick_on_cpu(baseline, device):
        (values,) = measure(model, [lambda: nullcontext(baseline)], inputs)
    return _cut(baseline, trace(baseline), None, summary(values, dense, inputs.seed))


def _planned(
    model: nn.Module, graph: SSMGraph, scores: Mapping[str, Scores], recipe: CompareRecipe
) -> dict[str, dict[float, Plan | str]]:
    """Return every scorer's plan for every fraction, or the reason for none. Raises InputError if there is no plan."""
    budget = {f.name: getattr(recipe.budget, f.name) for f in fields(recipe.budget)}
    plans: dict[str, dict[float, Plan | str]] = {label: {} for label in scores}
    for label, scored in scores.items():
        for sparsity in map(float, recipe.cells.sparsities):
            try:
                cut = plan(graph, scored, sparsity=sparsity, ignore=recipe.remove.ignore, **budget)
                check_plan(cut, graph, model=model)
                plans[label][sparsity] = cut
            except (InputError, PlanError) as error:  # PlanError: whole modules that have to stay
                plans[label][sparsity] = str(error)
    cuts = [cut for row in plans.values() for cut in row.values()]
    if all(isinstance(cut, str) for cut in cuts):
        raise InputError(str(cuts[0]))
    return plans


def _refitted(
    model: nn.Module,
    row: dict[float, Plan | str],
    recipe: CompareRecipe,
    text: Calibration,
    device: str | None,
    progress: Progress | None,
) -> dict[float, Plan | str]:
    """Return one scorer's plans with the new values of their refit, or the reason for none."""
    kind, better = recipe.method.refit, dict(row)
    for sparsity, cut in row.items() if kind != "none" else ():
        if isinstance(cut, Plan):
            try:
                found = refit(
                    model, cut, kind, calibration=text, settings=recipe.reconstruction, device=device, progress=progress
                )
                better[sparsity] = found.plan
            except InputError as error:
                better[sparsity] = str(error)
    return better


def _row_file(folder: Path | None, label: str, scores: Scores, key: str | None) -> tuple[Path | None, str]:
    """Write a scorer's scores, and return the file of its row (None without a key) and the row's key."""
    if folder is None:
        return None, ""
    name = quote(label, safe="")
    scores.save(folder / "scores" / f"{name}.safetensors")
    row_key = hashlib.sha256(f"{key} {_digest(scores)}".encode()).hexdigest()
    return (folder / ROWS / f"{name}.json" if key else None), row_key


def _measured(
    model: nn.Module, graph: SSMGraph, row: dict[float, Plan | str], inputs: Inputs, dense: Values,
    progress: Progress | None,
) -> Cells:  # fmt: skip
    """Measure one scorer's cuts together; an impossible cut stays the reason."""
    plans = {sparsity: cut for sparsity, cut in row.items() if isinstance(cut, Plan)}
    values = measure(model, [partial(masked, model, cut, graph) for cut in plans.values()], inputs, progress)
    cuts = {
        sparsity: _cut(model, graph, cut, summary(measured, dense, inputs.seed))
        for (sparsity, cut), measured in zip(plans.items(), values, strict=True)
    }
    return {sparsity: cuts.get(sparsity, str(cut)) for sparsity, cut in row.items()}


def _cut(model: nn.Module, graph: SSMGraph, cut: Plan | None, measures: dict[str, Interval]) -> Cut:
    size = sizes(model, graph, cut)
    kept = {name: reduction.after for name, reduction in cut.groups.items()} if cut else {}
    return Cut(measures, size.state_bytes, size.parameters, kept)


def _check_baseline(model: nn.Module, baseline: nn.Module | None) -> None:
    if baseline is not None:
        expected, actual = (embedding(m).num_embeddings for m in (model, baseline))
        if expected != actual:
            raise InputError(f"baseline: has {actual:,} tokens in its vocabulary and the model {expected:,}; a "
                             "baseline reads the same tokens")  # fmt: skip


def _digest(scores: Scores) -> str:
    digest = hashlib.sha256()
    bases = {f"{name}.{i}": part for name, basis in scores.bases.items() for i, part in enumerate(basis)}
    for name, tensor in sorted((scores.importance | bases).items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read(file: Path, key: str) -> Cells | None:
    """Read a finished row with the same key; None if there is none, or if it cannot be read."""
    try:
        data = strict_json.loads(file.read_text(encoding="utf-8"))
        return row_from_json(data["cells"]) if data["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _labelled(progress: Progress, label: str, phase: str, done: int, total: int) -> None:
    progress(f"{phase} {label}", done, total)
