"""Run recipes of commands: of `sspruner compare`, and of `sspruner bench` on a CPU and a GPU, with random weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import yaml
from common import NO, Made, Subject, span, table

import sspruner
from sspruner.benchmarking.record import Timing
from sspruner.benchmarking.shapes import DTYPES, shape_models
from sspruner.recipes.compare import CompareRecipe
from sspruner.recipes.measure import BenchOptions
from sspruner.recipes.yaml import from_data

SMALLER = {"recall-32": 0.5, "recall-16": 0.75}  # smaller models -> the cut of the same size


def compare(s: Any) -> Made:
    """Compare scorers and cuts of the reference model, observed on a part of a text and measured on another."""
    recipe = CompareRecipe.load(s.file)
    windows, passages = (4, 4) if s.quick else (recipe.calibration.samples, 200)
    subject = Subject("mamba2-books-4m", s.data)
    data = subject.text(recipe.calibration.source, windows, held_out=windows)
    recipe = replace(recipe, cells=replace(recipe.cells, lambada=None))  # the passages are given
    found = sspruner.compare(subject.model, recipe, calibration=data, passages=subject.passages(passages))
    return [found.to_markdown()], "seed 0"


def compare_recall(s: Any) -> Made:
    """Compare scorers on the recall model with dense models that have as few states, trained in as many steps."""
    recipe, made = CompareRecipe.load(s.file), []
    for small, sparsity in SMALLER.items():
        subject, baseline = Subject(s.work / "recall-64", s.data), sspruner.load(s.work / small, dtype="float32")[0]
        data = subject.text("recall", recipe.calibration.samples, held_out=2, seed=2_000_000)
        cells = replace(recipe, cells=replace(recipe.cells, sparsities=(sparsity,)))
        found = sspruner.compare(subject.model, cells, calibration=data, baseline=baseline)
        made.append(found.named("recall-64", "", small).to_markdown())
    return made, "seed 0"


def speed(s: Any) -> Made:
    """Measure what a smaller and a projected state gain at decode and prefill, with the stock step and accelerated.

    Each speed-up compares runs of one repeat with the same code, so that the gain of a smaller state and the gain of
    better code stay apart.
    """
    recipe = yaml.safe_load(s.file.read_text(encoding="utf-8"))
    options, device = bench_options(recipe, s.quick), recipe.get("device", "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; nothing was measured and nothing was written")
    cuts = [f"{kind} {size}" for kind in ("state", "balanced") for size in recipe.get(kind, ())]
    codes = {"": "", ", accelerated": ", accelerated"} if options.variants.accelerate else {"": ""}
    rows, machine = [], {}
    for shape in recipe["shapes"]:
        how: dict[str, Any] = {"layers": 2 if s.quick else None, "dtype": DTYPES[recipe.get("dtype", "float32")]}
        models = shape_models([shape], recipe["state"], recipe.get("balanced", ()), device=device, **how)
        for block in [block for model in models.values() for block in model.backbone.layers]:
            block.mixer.chunk_size = min(block.mixer.chunk_size, options.load.prompt)  # a prefill is padded to it
        found = sspruner.bench(models, options, device=device)
        machine, have = found.machine, {(row.model, row.batch, row.phase): row for row in found.rows}
        for phase, batch, code in [(p, b, c) for p in recipe["phases"] for b in options.load.batches for c in codes]:
            dense, stock = (have.get((name, batch, phase)) for name in (shape + code, shape))
            cells = [f"{dense.ms.value:.1f}", f"{100 * dense.fraction:.0f} %"] if dense else [NO, NO]
            cells += [faster(dense, stock) if code else "1"] if len(codes) > 1 else []
            smaller = [have.get((f"{shape}, {cut}{code}", batch, phase)) for cut in cuts]
            cells += [faster(row, dense) for row in smaller]
            cells.append(", ".join(f"{row.ceiling / dense.ceiling:.2f}" if row and dense else NO for row in smaller))
            rows.append([f"{shape}, {phase}, batch {batch}{code or ', stock' * (len(codes) > 1)}", *cells])
    milliseconds = "dense, ms a step" if recipe["phases"] == ["decode"] else "dense, ms"
    head = ["what", milliseconds, "of the ceiling", *["over stock"] * (len(codes) > 1)]
    head += [*(f"{cut} / dense" for cut in cuts), "bytes and operations allow"]
    title = f"{recipe['title']}: how many times as fast as the dense model with the same code; median (low to high)"
    note = f"{machine['name']}; seed 0; {options.load.repeats} repeats in turns, {options.load.generate} steps each"
    return [table(title, head, rows)], note


decode = gpu = projection_cost = speed


def bench_options(recipe: dict[str, Any], quick: bool) -> BenchOptions:
    """Return the options of a speed benchmark; a little of them if it is quick."""
    options: BenchOptions = from_data(BenchOptions, {key: recipe[key] for key in ("load", "variants") if key in recipe})
    few = replace(options.load, batches=options.load.batches[:1], repeats=1, generate=1)
    return replace(options, load=few) if quick else options


def faster(row: Timing | None, than: Timing | None) -> str:
    """Return how many times as fast as another timing one is; – for what did not fit into memory."""
    return span(row.speedup(than)) if row and than else NO
