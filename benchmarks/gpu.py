"""Decode and prefill on a GPU: dense, half of the state (as GHOST keeps it), and 16 directions (the balanced basis).

    python benchmarks/gpu.py --table docs/benchmarks.md

Random weights of published shapes, bf16; mamba_ssm's kernels where they can be imported. The table names the card.
"""

from __future__ import annotations

import json
from typing import Any

from common import deliver, options, progress, provenance, table
from decode import shown

SHAPES, STATE, DIRECTIONS = ("mamba2-1.3b", "mamba2-2.7b"), 64, 16
BATCHES = (1, 4, 16, 64, 128, 256, 512)


def rows_of(found: Any, shape: str, batches: tuple[int, ...]) -> list[list[str]]:
    """One row for each phase and batch; what did not fit is a dash."""
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
                    cells += [shown(row.speedup(dense)), f"{row.ceiling / dense.ceiling:.2f}", _fraction(row)]
            rows.append([f"{shape}, {phase}, batch {batch}", *cells])
    return rows


def _fraction(row: Any) -> str:
    return f"{100 * row.to_json()['fraction']:.0f} %"


def main() -> None:
    parser = options(__doc__, "gpu.py")
    parser.add_argument("--shape", action="append", choices=SHAPES)
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cuda-graph", action="store_true")
    given = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("gpu.py: torch sees no CUDA device; nothing was measured and nothing was written")

    import sspruner
    from sspruner.benchmarking.shapes import shape_models

    rows, numbers, machine, path = [], {}, {}, ""
    for shape in given.shape or SHAPES:
        models = shape_models(
            [shape], [STATE], [DIRECTIONS], layers=2 if given.quick else None, dtype=torch.bfloat16, device="cuda"
        )
        found = sspruner.bench(
            models,
            batches=given.batch,
            prompt=given.prompt,
            generate=given.generate,
            repeats=2 if given.quick else given.repeats,
            device="cuda",
            cuda_graph=given.cuda_graph,
            progress=lambda phase, done, total: progress(f"{done}/{total} {phase}"),
        )
        rows += rows_of(found, shape, tuple(given.batch))
        numbers[shape], machine, path = json.loads(found.to_json()), found.machine, found.rows[0].path
        del models, found
        torch.cuda.empty_cache()
    head = ["what", "dense, tokens/s", "of the ceiling"]
    for cut in (f"state {STATE}", f"balanced {DIRECTIONS}"):
        head += [f"{cut} / dense", "bytes and operations allow", "of its ceiling"]
    note = f"{path}; {machine['bandwidth'] / 1e9:,.0f} GB/s and {machine['flops'] / 1e12:,.0f} TFLOP/s measured; seed 0"
    title = f"{machine['name']}: speed-up over dense, median (low to high)"
    deliver(given, "gpu.py", table(title, head, rows) + "\n\n" + provenance(note), numbers)


if __name__ == "__main__":
    main()
