"""What the tool itself costs, as ratios in one run: prune against a forward, compare against its evaluations.

A forward is that of the stock model with its own settings over the calibration tokens, and beside it the same with what
`sspruner.compute.quick` does. Repeats are interleaved; a ratio is the median of those within a repeat.
"""

from __future__ import annotations

import copy
from statistics import median
from typing import Any

import torch
from common import Made, Subject, progress, random_tokens, span, table, timed

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
        data = subject.text("books-val.txt", s.samples)
        found = [prune_costs(subject, data) for _ in range(s.repeats)]
        rows += [
            [f"GHOST prune / forward, {unit}", dtype, *_row(found, unit), "at most 3"] for unit in ("stock", "quick")
        ]
        progress(f"prune, {dtype}")
    subject = Subject("mamba2-books-4m", s.data)
    data = subject.text("books-val.txt", max(1, s.samples // 4), held_out=max(1, s.samples // 8))  # as compare takes
    found = [compare_costs(subject, data) for _ in range(s.repeats)]
    for label, unit in (("its evaluations, each alone", "alone"), ("the same, dense once", "together")):
        rows.append([f"compare, 5 scorers x 4 cuts / {label}", "float32", *_row(found, unit), "at most 1.3"])
    head = ["what", "weights", "whole, s", "unit, s", "ratio (least to most)", "target"]
    tokens, others = int(data.mask.sum()), int(data.held_out_mask.sum())
    note = (
        f"seed 0; {s.repeats} interleaved repeats; prune: {s.samples} x 256 tokens observed; "
        f"compare: {tokens} tokens observed, {others} others measured"
    )
    return table("The tool against the model: medians", head, rows), note, None


def _row(found: list[dict[str, float]], unit: str) -> list[str]:
    ratios = sorted(run["whole"] / run[unit] for run in found)
    whole, one = (median(run[key] for run in found) for key in ("whole", unit))
    return [f"{whole:.1f}", f"{one:.1f}", span((median(ratios), ratios[0], ratios[-1]))]


def prune_costs(subject: Subject, data: Any) -> dict[str, float]:
    """Return the seconds of a forward over the calibration, stock and quick, and of prune."""
    dense = subject.model

    @torch.no_grad()
    def forwards() -> None:
        for tokens, _ in data.batches(16):
            dense(tokens, use_cache=False)

    def quick() -> None:
        with quick_on_cpu(dense, torch.device("cpu")):
            forwards()

    model, tokenizer = copy.deepcopy(dense), subject.tokenizer
    whole = lambda: sspruner.prune(model, "ghost", calibration=data, tokenizer=tokenizer)  # noqa: E731
    return {"stock": timed(forwards), "quick": timed(quick), "whole": timed(whole)}


def compare_costs(subject: Subject, data: Any) -> dict[str, float]:
    """Return the seconds of compare, scoring too, and of its evaluations: one after another, and all in one pass."""
    model, graph = subject.model, subject.graph
    scores = sspruner.score(model, SCORERS, calibration=data)
    plans = [sspruner.plan(graph, scored, sparsity=cut) for scored in scores.values() for cut in CUTS]
    size = max(1, 2048 // data.held_out.shape[1])

    def evaluate(plans: list[Any]) -> None:
        damages(model, plans, graph, data.held_out_batches(size))

    return {
        "alone": timed(lambda: [evaluate([plan]) for plan in plans]),
        "together": timed(lambda: evaluate(plans)),
        "whole": timed(lambda: sspruner.compare(model, SCORERS, sparsities=CUTS, calibration=data)),
    }


def large(s: Any) -> Made:
    """Return the phases on the 130M shape with random weights, once: random tokens observed, 4 x 256 held out."""
    model = shape_model("mamba2-130m", layers=2 if s.quick else None)
    ids = random_tokens(s.samples + 4, 256, model.config.vocab_size)
    data = sspruner.calibration(ids, model, samples=s.samples, seq_len=256, held_out=4, seed=0)
    seconds = sspruner.prune(model, "ghost", calibration=data).report.seconds
    minutes = f"{sum(seconds.values()) / 60:.1f}"
    row = ["130M, fp32", *(f"{seconds[phase]:.0f}" for phase in ("scoring", "evaluation", "proof")), minutes]
    head = ["shape", "scoring, s", "evaluation, s", "proof, s", "in all, minutes (target: below 15)"]
    note = f"seed 0, random weights; {len(data.tokens)} x 256 tokens observed, {len(data.held_out)} x 256 held out"
    return table("GHOST on the 130M shape, half of every state", head, [row]), note, None
