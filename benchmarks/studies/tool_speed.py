"""What the tool itself costs, as ratios in one run: prune against a forward, compare against its evaluations.

    python benchmarks/tool_speed.py --data ../shared/data --threads 1
    python benchmarks/tool_speed.py --data ../shared/data --large      # GHOST on the 130M shape, minutes

A forward is that of the stock model with its own settings over the calibration tokens, and beside it the same with what
`sspruner.compute.quick` does. Repeats are interleaved; a ratio is the median of those within a repeat.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from common import books, deliver, options, progress, provenance, table

import sspruner
from sspruner.benchmarking.shapes import shape_model
from sspruner.compute.quick import quick_on_cpu
from sspruner.evaluation.damage import damages

CPU = torch.device("cpu")
SCORERS, CUTS = ["ghost", "balanced", "taylor", "magnitude", "random"], (0.25, 0.5, 0.75, 0.9)


def main() -> None:
    parser = options(__doc__, "tool_speed.py")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences of 256 tokens")
    parser.add_argument("--large", action="store_true", help="the 130M shape instead (tool_speed.py --large)")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.quick:
        given.repeats, given.samples = 1, 2
    (large if given.large else small)(given)


def small(given: Any) -> None:
    rows, numbers, dense = [], {}, None
    for dtype in (torch.float32, torch.bfloat16):
        model, tokenizer = sspruner.load("mamba2-books-4m")
        dense = model.to(dtype)
        data = books(dense, tokenizer, given.data / "books-val.txt", given.samples)
        found = [_prune(dense, tokenizer, data) for _ in _each(given.repeats, f"prune, {dtype}")]
        numbers[str(dtype)] = found
        for label in ("stock", "quick"):
            rows.append([f"GHOST prune / forward, {label}", str(dtype).removeprefix("torch."), *_row(found, label)])
    model, tokenizer = sspruner.load("mamba2-books-4m")
    dense = model.float()
    windows = max(1, given.samples // 4), max(1, given.samples // 8)  # as many as compare takes by itself
    data = sspruner.calibration(
        given.data / "books-val.txt", dense, tokenizer, samples=windows[0], seq_len=256, held_out=windows[1]
    )
    found = [_compare(dense, data) for _ in _each(given.repeats, "compare")]
    numbers["compare"] = found
    for label, unit in (("its evaluations, each alone", "alone"), ("the same, dense once", "together")):
        rows.append([f"compare, 5 scorers x 4 cuts / {label}", "float32", *_row(found, unit)])
    head = ["what", "weights", "whole, s", "unit, s", "ratio (least to most)", "target"]
    targets = {"GHOST": "3", "compare": "1.3"}
    for row in rows:
        row.append(f"at most {targets[row[0].split(',')[0].split()[0]]}")
    tokens, others = int(data.mask.sum()), int(data.held_out_mask.sum())
    note = (
        f"seed 0; {given.repeats} interleaved repeats; prune: {given.samples} x 256 tokens observed; "
        f"compare: {tokens} tokens observed, {others} others measured"
    )
    text = table("The tool against the model: medians", head, rows) + f"\n\n{provenance(note)}"
    deliver(given, "tool_speed.py", text, numbers)


def _each(repeats: int, what: str) -> Any:
    for repeat in range(repeats):
        progress(f"{what}, {repeat + 1} of {repeats}")
        yield repeat


def _row(found: list[dict[str, float]], unit: str) -> list[str]:
    ratios = sorted(run["whole"] / run[unit] for run in found)
    whole, one = (median(run[key] for run in found) for key in ("whole", unit))
    return [f"{whole:.1f}", f"{one:.1f}", f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"]


def _prune(dense: Any, tokenizer: Any, data: Any) -> dict[str, float]:
    def forwards() -> None:
        with torch.no_grad():
            for tokens, _ in data.batches(16):
                dense(tokens, use_cache=False)

    def quick() -> None:
        with quick_on_cpu(dense, CPU):
            forwards()

    model = copy.deepcopy(dense)
    return {
        "stock": seconds(forwards),
        "quick": seconds(quick),
        "whole": seconds(lambda: sspruner.prune(model, "ghost", calibration=data, tokenizer=tokenizer)),
    }


def _compare(model: Any, data: Any) -> dict[str, float]:
    """All of compare, scoring too; and what its evaluations take: every cut beside the dense model, one after another,
    and all of them in one pass, in which the dense model runs once."""
    graph = sspruner.trace(model)
    scores = sspruner.score(model, SCORERS, calibration=data)
    plans = [sspruner.plan(graph, scored, sparsity=cut) for scored in scores.values() for cut in CUTS]
    per_batch = max(1, 2048 // data.held_out.shape[1])

    def alone() -> None:
        for plan in plans:
            damages(model, [plan], graph, data.held_out_batches(per_batch))

    return {
        "alone": seconds(alone),
        "together": seconds(lambda: damages(model, plans, graph, data.held_out_batches(per_batch))),
        "whole": seconds(lambda: sspruner.compare(model, SCORERS, sparsities=CUTS, calibration=data)),
    }


def large(given: Any) -> None:
    """The 130M shape with random weights, once: 128 x 256 random tokens observed, 4 x 256 held out."""
    model = shape_model("mamba2-130m", layers=2 if given.quick else None)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (given.samples + 4, 256), generator=generator)
    data = sspruner.calibration(ids, model, None, samples=given.samples, seq_len=256, held_out=4, seed=0)
    report = sspruner.prune(model, "ghost", calibration=data).report
    whole = sum(report.seconds.values())
    row = ["130M, fp32", *(f"{report.seconds[k]:.0f}" for k in ("scoring", "evaluation", "proof")), f"{whole / 60:.1f}"]
    head = ["shape", "scoring, s", "evaluation, s", "proof, s", "in all, minutes (target: below 15)"]
    note = f"seed 0, random weights; {len(data.tokens)} x 256 tokens observed, {len(data.held_out)} x 256 held out"
    text = table("GHOST on the 130M shape, half of every state", head, [row]) + f"\n\n{provenance(note)}"
    deliver(given, "tool_speed.py --large", text, report.seconds)


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
