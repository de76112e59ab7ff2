"""Recipes of commands: of `sspruner compare`, and of `sspruner bench` for published shapes on a CPU and a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import yaml
from common import Made, Subject, progress, span, table

import sspruner
from sspruner.benchmarking.shapes import shape_models
from sspruner.recipes.compare import CompareRecipe
from sspruner.recipes.measure import BenchOptions
from sspruner.recipes.yaml import from_data

CPU_SHAPES, KEEP = ("mamba2-130m", "mamba2-370m"), (64, 32, 16)
GPU_SHAPES, STATE, DIRECTIONS = ("mamba2-1.3b", "mamba2-2.7b"), 64, 16


def compare(s: Any) -> Made:
    """Scorers and cuts of the reference model, observed on a part of a text and measured on another."""
    recipe = CompareRecipe.load(s.file)
    windows, passages = (4, 4) if s.quick else (recipe.calibration.samples, 200)
    subject = Subject("mamba2-books-4m", s.data)
    data = subject.text(recipe.calibration.source, windows, recipe.calibration.seq_len, held_out=windows)
    recipe = replace(recipe, cells=replace(recipe.cells, lambada=None))  # the passages are given
    found = sspruner.compare(
        subject.model,
        recipe,
        calibration=data,
        passages=subject.passages(passages),
        on_row=lambda found: progress(", ".join(found.cells)),
    )
    return found.to_markdown(), "seed 0", None


def bench_options(s: Any) -> BenchOptions:
    """Read the options of a speed benchmark; a little of them if it is quick."""
    options: BenchOptions = from_data(BenchOptions, yaml.safe_load(s.file.read_text(encoding="utf-8")))
    few = replace(options.load, batches=options.load.batches[:1], repeats=1, generate=1)
    return replace(options, load=few) if s.quick else options


def decode(s: Any) -> Made:
    """What a smaller state gains at decode on a CPU: stock step and accelerated, dense and pruned, in turns.

    Each speed-up compares runs of one repeat with the same code, so that the gain of a smaller state and the gain of
    better code stay apart.
    """
    options, rows, numbers = bench_options(s), [], {}
    for shape in CPU_SHAPES:
        models = shape_models([shape], KEEP, layers=2 if s.quick else None)
        for model in models.values():
            for block in model.backbone.layers:
                block.mixer.chunk_size = options.load.prompt  # a prefill is padded to it
        found = sspruner.bench(models, options, device="cpu")
        rows += _codes(found, shape)
        numbers[shape] = found.to_json()
        progress(shape)
    head = ["what", "dense, ms a step", "of the ceiling", "over stock", *[f"state {k} / dense" for k in KEEP]]
    head.append("bytes and operations allow")
    title = "Decode: how many times as fast as the dense model with the same code; median (low to high)"
    load = options.load
    note = (
        f"seed 0; {load.repeats} repeats in turns, {load.generate} steps each; fp32; {2 if s.quick else 'all'} layers"
    )
    return table(title, head, rows), note, numbers


def _codes(found: Any, shape: str) -> list[list[str]]:
    """Return, for each batch, a row for the stock code and one for the faster step."""
    rows = []
    for batch in dict.fromkeys(row.batch for row in found.rows):
        for name, code in (("stock", ""), ("accelerated", ", accelerated")):
            dense = found.row(shape + code, batch)
            cuts = [found.row(f"{shape}, state {k}{code}", batch) for k in KEEP]
            cells = [f"{dense.to_json()['ms'][0]:.1f}", _fraction(dense)]
            cells += [span(dense.speedup(found.row(shape, batch))) if code else "1"]
            cells += [*[span(cut.speedup(dense)) for cut in cuts]]
            cells += [", ".join(f"{cut.ceiling / dense.ceiling:.2f}" for cut in cuts)]
            rows.append([f"{shape}, batch {batch}, {name}", *cells])
    return rows


def gpu(s: Any) -> Made:
    """Decode and prefill on a GPU: dense, half of the state, and the balanced basis; the table names the card."""
    if not torch.cuda.is_available():
        raise SystemExit("gpu: torch sees no CUDA device; nothing was measured and nothing was written")
    options, rows, numbers, machine, path = bench_options(s), [], {}, {}, ""
    for shape in GPU_SHAPES:
        layers = 2 if s.quick else None
        models = shape_models([shape], [STATE], [DIRECTIONS], layers=layers, dtype=torch.bfloat16, device="cuda")
        found = sspruner.bench(models, options, device="cuda")
        rows += _phases(found, shape, options.load.batches)
        numbers[shape], machine, path = found.to_json(), found.machine, found.rows[0].path
        del models
        torch.cuda.empty_cache()
    head = ["what", "dense, tokens/s", "of the ceiling"]
    for cut in (f"state {STATE}", f"balanced {DIRECTIONS}"):
        head += [f"{cut} / dense", "bytes and operations allow", "of its ceiling"]
    note = f"{path}; {machine['bandwidth'] / 1e9:,.0f} GB/s and {machine['flops'] / 1e12:,.0f} TFLOP/s measured; seed 0"
    return table(f"{machine['name']}: speed-up over dense, median (low to high)", head, rows), note, numbers


def _phases(found: Any, shape: str, batches: tuple[int, ...]) -> list[list[str]]:
    """Return one row for each phase and batch; what did not fit is a dash."""
    have = {(row.model, row.batch, row.phase): row for row in found.rows}
    rows = []
    for phase in ("decode", "prefill"):
        for batch in batches:
            dense = have.get((shape, batch, phase))
            cells = [f"{dense.tokens_per_second[0]:,.0f}", _fraction(dense)] if dense else ["–", "–"]
            for label in (f"{shape}, state {STATE}", f"{shape}, balanced {DIRECTIONS}"):
                row = have.get((label, batch, phase))
                if row is None:
                    cells += ["–", "–", "–"]
                elif dense is None:
                    cells += [f"{row.tokens_per_second[0]:,.0f} tokens/s", "–", _fraction(row)]
                else:
                    cells += [span(row.speedup(dense)), f"{row.ceiling / dense.ceiling:.2f}", _fraction(row)]
            rows.append([f"{shape}, {phase}, batch {batch}", *cells])
    return rows


def _fraction(row: Any) -> str:
    return f"{100 * row.to_json()['fraction']:.0f} %"
