"""Measure what the tool itself costs, as ratios in one run: prune against a forward, compare against its evaluations.

A forward is that of the stock model with its own settings over the calibration tokens, and beside it the same with what
`sspruner.compute.quick` does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from common import Made, Subject, forward, in_turns, over, random_tokens, table

import sspruner
from sspruner.benchmarking.shapes import shape_model
from sspruner.compute.quick import quick_on_cpu
from sspruner.evaluation.damage import damages

SCORERS, CUTS = ["ghost", "balanced", "taylor", "magnitude", "random"], (0.25, 0.5, 0.75, 0.9)


def tables(s: Any) -> Made:
    """Return what prune and compare cost. Settings: repeats, samples; large: the 130M shape instead."""
    if getattr(s, "large", False):
        return large(s)
    rows = []
    for dtype in ("float32", "bfloat16"):
        subject = Subject("mamba2-books-4m", s.data, dtype)
        took = in_turns(prune_jobs(subject, subject.text("books-val.txt", s.samples)), s.repeats, warm_up=False)
        rows += [row(f"GHOST prune / forward, {unit}", dtype, took, unit, "at most 3") for unit in ("stock", "quick")]
    subject = Subject("mamba2-books-4m", s.data)
    data = subject.text("books-val.txt", max(1, s.samples // 4), held_out=max(1, s.samples // 8))  # as compare takes
    took = in_turns(compare_jobs(subject, data), s.repeats, warm_up=False)
    for label, unit in (("its evaluations, each alone", "alone"), ("the same, dense once", "together")):
        rows.append(row(f"compare, 5 scorers x 4 cuts / {label}", "float32", took, unit, "at most 1.3"))
    head = ["what", "weights", "whole, s", "unit, s", "ratio (least to most)", "target"]
    note = f"seed 0; {s.repeats} interleaved repeats; prune: {s.samples} x 256 tokens observed; "
    note += f"compare: {data.mask.sum()} tokens observed, {data.held_out_mask.sum()} others measured"
    return [table("The tool against the model: medians", head, rows)], note


def row(label: str, dtype: str, took: dict[str, list[float]], unit: str, target: str) -> list[str]:
    """Return a row of the table: of a whole job against a unit."""
    seconds = [f"{median(took[name]):.1f}" for name in ("whole", unit)]
    return [label, dtype, *seconds, over(took["whole"], took[unit]), target]


def prune_jobs(subject: Subject, data: Any) -> dict[str, Callable[[], Any]]:
    """Return a forward over the calibration, stock and quick, and prune."""
    dense, tokenizer = subject.model, subject.tokenizer

    def forwards() -> None:
        for tokens, _ in data.batches(16):
            forward(dense, tokens)

    def quick() -> None:
        with quick_on_cpu(dense, torch.device("cpu")):
            forwards()

    def whole() -> None:
        sspruner.prune(copy.deepcopy(dense), "ghost", calibration=data, tokenizer=tokenizer)

    return {"stock": forwards, "quick": quick, "whole": whole}


def compare_jobs(subject: Subject, data: Any) -> dict[str, Callable[[], Any]]:
    """Return compare, scoring too, and its evaluations: one after another, and all in one pass."""
    model, graph = subject.model, subject.graph
    scores = sspruner.score(model, SCORERS, calibration=data)
    plans = [sspruner.plan(graph, scored, sparsity=cut) for scored in scores.values() for cut in CUTS]
    size = max(1, 2048 // data.held_out.shape[1])

    def evaluate(plans: list[Any]) -> None:
        damages(model, plans, graph, data.held_out_batches(size))

    return {
        "alone": lambda: [evaluate([plan]) for plan in plans],
        "together": lambda: evaluate(plans),
        "whole": lambda: sspruner.compare(model, SCORERS, sparsities=CUTS, calibration=data),
    }


def large(s: Any) -> Made:
    """Return the phases on the 130M shape with random weights, once: random tokens observed, 4 x 256 held out."""
    model = shape_model("mamba2-130m", layers=2 if s.quick else None)
    ids = random_tokens(s.samples + 4, 256, model.config.vocab_size)
    data = sspruner.calibration(ids, model, samples=s.samples, seq_len=256, held_out=4, seed=0)
    seconds = sspruner.prune(model, "ghost", calibration=data).report.seconds
    phases = [f"{seconds[phase]:.0f}" for phase in ("scoring", "evaluation", "proof")]
    head = ["shape", "scoring, s", "evaluation, s", "proof, s", "in all, minutes (target: below 15)"]
    note = f"seed 0, random weights; {len(data.tokens)} x 256 tokens observed, {len(data.held_out)} x 256 held out"
    rows = [["130M, fp32", *phases, f"{sum(seconds.values()) / 60:.1f}"]]
    return [table("GHOST on the 130M shape, half of every state", head, rows)], note
