"""Compare: several scorers, several cuts, one pass of scoring, one held-out text."""

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
from sspruner.budgets.resolve import resolve_budget
from sspruner.calibrate.sources import Calibration, Progress
from sspruner.comparison.record import Comparison, Cut, row_from_json, row_to_json
from sspruner.compute.device import on_device, resolve_device
from sspruner.compute.forward import embedding
from sspruner.compute.quick import quick_on_cpu
from sspruner.errors import InputError, PlanError
from sspruner.evaluation.last_word import Passage, passages, read_passages
from sspruner.evaluation.measures import Asked, Values, check_metrics, measure, questions, summary
from sspruner.evaluation.paired import Interval
from sspruner.files import strict_json
from sspruner.files.output import atomic_file, check_results
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.graph.trace import trace
from sspruner.plans.plan import Plan, check_plan
from sspruner.recipes.common import FILE, recipe_or_short
from sspruner.recipes.compare import CompareRecipe
from sspruner.recipes.parts import Budget
from sspruner.recipes.recipe import Recipe
from sspruner.scoring.cache import cache_key
from sspruner.scoring.choice import DEFAULT
from sspruner.scoring.known import find_scorer, installed_scorers
from sspruner.scoring.score import Source, calibrated, score
from sspruner.scoring.scores import Scores
from sspruner.surgery.mask import masked
from sspruner.surgery.sizes import sizes

ROWS = ".rows"  # in the folder of a comparison: the rows that are finished
MARKS = ("compare.json", ROWS)  # a folder with one of these is one
PASSAGES = 500  # of LAMBADA, where a recipe names a file

Cells = dict[float, Cut | str]  # of one scorer: sparsity -> the cut, or why it cannot be made


@dataclass(frozen=True)
class Given:
    """What stands in Python for what a recipe can only name, and the callback of rows.

    calibration: anything that `sspruner.calibration` takes, or its result, instead of the recipe's source. baseline: a
    smaller dense model with the same vocabulary. passages: of LAMBADA (last_word.passages). on_row: called with what is
    known after every row.
    """

    calibration: Source | None = None
    baseline: nn.Module | None = None
    passages: Sequence[Passage] = ()
    on_row: Callable[[Comparison], None] | None = None


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
    """Score with all scorers in one pass over the dense model, plan every cut of each, and measure them all, masked, on
    the held-out text. The model is left as it was, and is in memory once.

    Args:
        recipe: a `CompareRecipe`. Or scorers, with the fields of the recipe's parts as `short` arguments:
            `compare(model, ["ghost", "magnitude"], sparsities=(0.5,), axis="head")`. The metrics "ppl" and "kl" come
            together; "lambada" needs passages; "recall" is of sequences that are made with the seed.
        tokenizer: to read text.
        device: the compute device; CUDA if there is one, else the CPU.
        cache: take scores that were made before (docs/calibration.md).
        out: a folder for the recipe, each scorer's scores and finished row: a later call there takes the rows of which
            nothing has changed since. The result's `save` writes its tables there.
        progress: called with (phase, done, total).
        short: also the fields of `Given` (`calibration`, `baseline`, `passages`, `on_row`), also with a recipe.

    Raises:
        InputError: for bad arguments. A cut that a scorer cannot make is a cell with the reason.

    Scorers that also change weights are compared by their selection alone.
    """
    recipe, given = _asked(recipe, short)
    given, seed = _prepared(model, recipe, given, tokenizer), recipe.method.seed
    folder = None if out is None else check_results(out, MARKS)
    compute = resolve_device(device)
    with on_device(model, compute):
        data = _calibrated(model, recipe, given, tokenizer, progress)
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
    asked = questions(model, list(data.held_out_batches()), recipe.cells.metrics, given.passages, seed)
    key = _key(model, graph, recipe, given, data, compute)
    with on_device(model, compute), quick_on_cpu(model, compute):
        (dense,) = measure(model, [lambda: nullcontext(model)], asked)
        found = _without_rows(recipe, data, scores, _cut(model, graph, None, summary(dense, dense, asked.seed)))
        if given.baseline is not None:
            found = replace(found, baseline=_measured_baseline(model, given.baseline, asked, dense, compute))
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
            if given.on_row:
                given.on_row(found)
    return found


def check_recipe(recipe: CompareRecipe, has_passages: bool = False) -> CompareRecipe:
    """Return a recipe that names its scorers, after all checks that need no model.

    Raises InputError for a recipe that makes no sense.
    """
    cells, budget = recipe.cells, recipe.budget
    scorers = _default_scorers(recipe.axis) if cells.scorers is None else cells.scorers
    if not scorers or not cells.sparsities:
        raise InputError("compare: name at least one scorer and one sparsity")
    if budget.allocation == "adaptive":
        raise InputError("compare: allocation adaptive measures the layers of one scorer; use prune for each")
    for name in scorers:
        if isinstance(name, str):
            find_scorer(name)
    shared = {f.name: getattr(budget, f.name) for f in fields(budget)}
    for sparsity in map(float, cells.sparsities):
        resolve_budget(Recipe(remove=recipe.remove, budget=Budget(**shared, sparsity=sparsity)))
    check_metrics(cells.metrics, has_passages or bool(cells.lambada))
    return replace(recipe, cells=replace(cells, scorers=tuple(scorers)))


def _asked(recipe: Any, short: dict[str, Any]) -> tuple[CompareRecipe, Given]:
    """Return the recipe, or the one that scorers and short arguments make, and what is given beside it."""
    names = {f.name for f in fields(Given)}
    beside = {name: short.pop(name) for name in list(short) if name in names}
    given = Given(**{name: value for name, value in beside.items() if value is not None})
    if not isinstance(recipe, CompareRecipe):
        scorers = short.pop("scorers", None) if recipe is None else recipe
        return check_recipe(CompareRecipe.of(scorers, **short), bool(given.passages)), given
    return check_recipe(recipe_or_short(CompareRecipe, recipe, short), bool(given.passages)), given


def _default_scorers(axis: str) -> list[str]:
    """Return ghost, where it scores this axis, and all installed scorers that need only weights."""
    able = {name: cls for name, (cls, _) in sorted(installed_scorers().items()) if axis in cls.axes}
    return [name for name, cls in able.items() if name == DEFAULT or cls.needs == "weights"] or [DEFAULT]


def _prepared(model: nn.Module, recipe: CompareRecipe, given: Given, tokenizer: Any) -> Given:
    """Check the baseline, and read the passages that the recipe names."""
    if recipe.cells.baseline is not None and given.baseline is None:
        raise InputError(f"baseline {recipe.cells.baseline}: load it, and give the model as baseline=")
    _check_baseline(model, given.baseline)
    if recipe.cells.lambada is None or given.passages:
        return given
    texts = read_passages(recipe.cells.lambada)
    return replace(given, passages=tuple(passages(tokenizer, texts, PASSAGES, recipe.method.seed)))


def _calibrated(
    model: nn.Module, recipe: CompareRecipe, given: Given, tokenizer: Any, progress: Progress | None
) -> Calibration:
    text = recipe.calibration
    source = text.source if given.calibration is None else given.calibration
    return calibrated(source, model, tokenizer, text, recipe.method.seed, progress)


def _prepare_folder(folder: Path, recipe: CompareRecipe) -> None:
    for part in (ROWS, "scores"):
        (folder / part).mkdir(exist_ok=True)
    recipe.save(folder / FILE)


def _key(
    model: nn.Module, graph: SSMGraph, recipe: CompareRecipe, given: Given, data: Calibration, device: torch.device
) -> str | None:
    """Return what a row has to be of, beside its scores: model, code, cuts, metrics and held-out text."""
    decided = recipe.to_json()
    of_cuts = {key: decided.get(key) for key in ("remove", "budget")}
    of_metrics = {
        "metrics": sorted(recipe.cells.metrics),
        "passages": [asdict(passage) for passage in given.passages],
        "seed": recipe.method.seed,
        "device": device.type,
        "sparsities": list(recipe.cells.sparsities),
    }
    code = [type(site.family) for site in graph.layers]
    return cache_key(model, code, of_metrics | of_cuts, data.held_out, data.held_out_mask)


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


def _measured_baseline(model: nn.Module, baseline: nn.Module, asked: Asked, dense: Values, device: torch.device) -> Cut:
    """Measure a smaller dense model on the same tokens, against the model."""
    with on_device(baseline, device), quick_on_cpu(baseline, device):
        (values,) = measure(model, [lambda: nullcontext(baseline)], asked)
    return _cut(baseline, trace(baseline), None, summary(values, dense, asked.seed))


def _planned(
    model: nn.Module, graph: SSMGraph, scores: Mapping[str, Scores], recipe: CompareRecipe
) -> dict[str, dict[float, Plan | str]]:
    """Every scorer's plan for every fraction, or why there is none. Raises InputError if there is none at all."""
    budget = {f.name: getattr(recipe.budget, f.name) for f in fields(recipe.budget)}
    plans: dict[str, dict[float, Plan | str]] = {label: {} for label in scores}
    for label, scored in scores.items():
        for sparsity in map(float, recipe.cells.sparsities):
            try:
                made = plan(graph, scored, sparsity=sparsity, ignore=recipe.remove.ignore, **budget)
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
