"""What a smaller state gains at decode on a CPU: stock step and `sspruner.accelerate`, dense and pruned, in turns.

    python benchmarks/decode.py --threads 1 --table docs/benchmarks.md

Random weights of published shapes, fp32: latency needs no trained ones. Each speed-up compares runs of one repeat with
the same code, so that the gain of a smaller state and the gain of better code stay apart.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from common import deliver, options, progress, provenance, table

import sspruner
from sspruner.benchmarking.shapes import shape_models

SHAPES, KEEP, BATCHES = ("mamba2-130m", "mamba2-370m"), (64, 32, 16), (1, 8, 32)
PROMPT = 4  # tokens: a state costs the same after any


def shown(found: tuple[float, float, float]) -> str:
    """The median (low to high)."""
    return f"{found[0]:.2f} ({found[1]:.2f} to {found[2]:.2f})"


def rows_of(found: Any, shape: str, keep: tuple[int, ...]) -> list[list[str]]:
    """Per batch: the stock code, and the faster step; last, what the faster step gains on the dense model."""
    rows = []
    for batch in dict.fromkeys(row.batch for row in found.rows):
        for code in ("", ", accelerated"):
            dense = found.row(shape + code, batch)
            cells = [shown(found.row(f"{shape}, state {k}{code}", batch).speedup(dense)) for k in keep]
            ceilings = [found.row(f"{shape}, state {k}{code}", batch).ceiling / dense.ceiling for k in keep]
            most = ", ".join(f"{c:.2f}" for c in ceilings)
            gain = shown(dense.speedup(found.row(shape, batch))) if code else "1"
            reached = f"{100 * dense.to_json()['fraction']:.0f} %"
            ms = f"{dense.to_json()['ms'][0]:.1f}"
            rows.append(
                [f"{shape}, batch {batch}, {'accelerated' if code else 'stock'}", ms, reached, gain, *cells, most]
            )
    return rows


def main() -> None:
    parser = options(__doc__, "decode.py")
    parser.add_argument("--layers", type=int, help="fewer than the shapes have, to be quick")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads or torch.get_num_threads())
    layers, repeats = (2, 2) if given.quick else (given.layers, given.repeats)
    rows, numbers = [], {}
    for shape in SHAPES:
        models = shape_models([shape], KEEP, layers=layers)
        for model in models.values():
            for block in model.backbone.layers:
                block.mixer.chunk_size = PROMPT  # a prefill is padded to it
        found = sspruner.bench(
            models,
            batches=BATCHES,
            prompt=PROMPT,
            generate=given.steps,
            repeats=repeats,
            accelerate=True,
            device="cpu",
            progress=lambda phase, done, total: progress(f"{done}/{total} {phase}") if done % 24 == 0 else None,
        )
        rows += rows_of(found, shape, KEEP)
        numbers[shape] = found.to_json()
        del models, found
    head = ["what", "dense, ms a step", "of the ceiling", "over stock", *[f"state {k} / dense" for k in KEEP]]
    head.append("bytes and operations allow")
    title = "Decode: how many times as fast as the dense model with the same code; median (low to high)"
    note = f"seed 0; {repeats} repeats in turns, {given.steps} steps each; fp32; {layers or 'all'} layers"
    deliver(given, "decode.py", table(title, head, rows) + "\n\n" + provenance(note), numbers)


if __name__ == "__main__":
    sys.exit(main())
