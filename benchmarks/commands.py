"""Run recipes of commands: of `sspruner compare` and its leaderboard; of `sspruner bench` on a CPU and in engines."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import yaml
from common import HERE, NO, Made, Subject, span, table

import sspruner
from sspruner.benchmarking.record import Timing
from sspruner.benchmarking.shapes import DTYPES, SHAPES, shape_models
from sspruner.recipes.compare import CompareRecipe
from sspruner.recipes.leaderboard import Board
from sspruner.recipes.measure import BenchOptions
from sspruner.recipes.yaml import from_data

RESULTS = HERE.parent / "results" / "leaderboard"
PARTS = ("load", "variants", "runner")  # of BenchOptions, in recipes
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


def leaderboard(s: Any) -> Made:
    """Make the leaderboard in the work folder, and copy it to results/; a quick one stays there."""
    asked, out = yaml.safe_load(s.file.read_text(encoding="utf-8")), s.work / f"leaderboard{'-quick' * s.quick}"
    board, calls = Board(**asked["board"] | getattr(s, "board", {})), getattr(s, "rows", asked["rows"])
    if s.quick:
        board, calls = replace(board, models=board.models[:1], seeds=(0,), windows=2), [{"scorers": ["magnitude"]}]
    for call in calls:
        found = sspruner.leaderboard(out, board=board, recipe=CompareRecipe.of(**asked["shared"] | call))
    for file in out.glob("leaderboard.*") if not s.quick else ():
        RESULTS.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, RESULTS)
        if file.suffix == ".png":
            shutil.copy(file, HERE.parent / "docs" / "figures")
    return [found.to_markdown()], "sspruner compare --leaderboard adds a row"


def speed(s: Any) -> Made:
    """Measure what a smaller state gains. Each speed-up compares runs of one repeat with the same code or engine."""
    recipe = yaml.safe_load(s.file.read_text(encoding="utf-8")) | getattr(s, "recipe", {})
    options = bench_options(recipe, s.quick)
    cuts = [f"{kind} {size}" for kind in ("state", "balanced") for size in recipe.get(kind, ())]
    codes = {"": "", ", accelerated": ", accelerated"} if options.variants.accelerate else {"": ""}
    rows, machine, engine = [], {}, ""
    for shape in recipe["shapes"]:
        models = models_of(shape, recipe, s.data, layers=2 if s.quick else None)
        for block in [block for m in models.values() for block in m.backbone.layers if not options.runner.python]:
            block.mixer.chunk_size = min(block.mixer.chunk_size, options.load.prompt)  # a prefill is padded to it
        found = sspruner.bench(models, options, device="cpu")
        engine = "{name} {version}".format(**found.engine) if options.runner.python else ""
        machine, have = found.machine, {(row.model, row.batch, row.phase): row for row in found.rows}
        for phase, batch, code in [(p, b, c) for p in recipe["phases"] for b in options.load.batches for c in codes]:
            dense, stock = (have.get((name, batch, phase)) for name in (shape + code, shape))
            smaller = [have.get((f"{shape}, {cut}{code}", batch, phase)) for cut in cuts]
            cells = beside(dense, smaller)
            cells[2:2] = [faster(dense, stock) if code else "1"] if len(codes) > 1 else []
            both = [f"{r.tokens_per_second[0]:,.0f}; {(r.cache_bytes or 0) / 1e6:.2f}" for r in [dense, *smaller] if r]
            rows.append([f"{shape}, {phase}, batch {batch}{code or ', stock' * (len(codes) > 1)}", *cells])
            rows[-1] += [" / ".join(both)] if engine else []
    head = [engine or "what", "dense, ms" + " a step" * (recipe["phases"] == ["decode"]), "of the ceiling"]
    head += ["over stock"] * (len(codes) > 1) + [f"{cut} / dense" for cut in cuts] + ["bytes and operations allow"]
    head += ["tokens/s; MB of cache a sequence"] if engine else []
    title = f"{recipe['title']}: how many times as fast as the dense model with the same code; median (low to high)"
    note = f"{machine['name']}; seed 0; {options.load.repeats} repeats in turns, {options.load.generate} steps each"
    return [table(title, head, rows)], note


decode = projection_cost = engines = engines_130m = speed


def gpu(s: Any) -> Made:
    """Run gpu.py, with what it needs kept in the work folder. Settings: device, minutes."""
    from gpu import measured

    return measured(s.device, s.minutes, s.work / "gpu", s.quick)


def beside(dense: Timing | None, smaller: Sequence[Timing | None]) -> list[str]:
    """Return the dense model's ms and fraction of its ceiling, each cut's speed-up, and what the ceilings allow."""
    cells = [f"{dense.ms.value:.1f}", f"{100 * dense.fraction:.0f} %"] if dense else [NO, NO]
    allowed = [f"{row.ceiling / dense.ceiling:.2f}" if row and dense else NO for row in smaller]
    return [*cells, *(faster(row, dense) for row in smaller), ", ".join(allowed)]


def models_of(shape: str, recipe: dict[str, Any], data: Any, **how: Any) -> dict[str, Any]:
    """Return a published shape with random weights, or a trained model, and cuts of it."""
    if shape in SHAPES:
        how["dtype"] = DTYPES[recipe.get("dtype", "float32")]
        return shape_models([shape], recipe["state"], recipe.get("balanced", ()), **how)
    subject = Subject(shape, data)
    plans = {f"{shape}, state {k}": subject.plan(None, "magnitude", keep=k) for k in recipe["state"]}
    return {shape: subject.model} | {n: sspruner.apply(Subject(shape, data).model, p) for n, p in plans.items()}


def bench_options(recipe: dict[str, Any], quick: bool) -> BenchOptions:
    """Return the options of a speed benchmark; a little of them if it is quick."""
    options: BenchOptions = from_data(BenchOptions, {key: recipe[key] for key in PARTS if key in recipe})
    few = replace(options.load, batches=options.load.batches[:1], repeats=1, generate=1)
    return replace(options, load=few) if quick else options


def faster(row: Timing | None, than: Timing | None) -> str:
    """Return how many times as fast as another timing one is; – for what did not fit into memory."""
    return span(row.speedup(than)) if row and than else NO
