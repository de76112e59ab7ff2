"""Where to cut: one fraction for all layers, one threshold, or the best split by measured damage.

    python benchmarks/allocation.py --threads 1 --data ../shared/data --table docs/benchmarks.md

Scores, and the curves of "adaptive", from 32 x 256 tokens of books-val.txt; reported on 32 x 256 of books-test.txt.
"""

from __future__ import annotations

from typing import Any

import torch
from common import books, deliver, options, progress, provenance, table

import sspruner
from sspruner.evaluation.damage import damages

CUTS = (
    ("mamba2-books-4m", "state", "ghost", (0.75, 0.9, 0.97)),
    ("mamba2-books-4m", "state", "balanced", (0.75, 0.9, 0.97)),
    ("mamba2-books-4m", "head", "ghost", (0.25, 0.5)),
    ("mamba1-books", "channel", "ghost", (0.25, 0.5)),
    ("zamba2-books", "head", "ghost", (0.25, 0.5)),
)
ALLOCATIONS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "global, energy": {"allocation": "global", "normalise": "energy"},
    "global, last": {"allocation": "global", "normalise": "last"},
    "global, none": {"allocation": "global", "normalise": "none"},
    "adaptive": {"allocation": "adaptive"},
}
WINDOWS, REPORTED, SEED = 32, 32, 0


def main() -> None:
    parser = options(__doc__, "allocation.py")
    parser.add_argument("--cuts", type=int, nargs="+", default=range(len(CUTS)), help="some of the cuts, by number")
    given = parser.parse_args()
    chosen_cuts = [CUTS[i] for i in given.cuts]
    if given.threads:
        torch.set_num_threads(given.threads)
    rows, numbers = [], {}
    for name, axis, scorer, fractions in chosen_cuts[:1] if given.quick else chosen_cuts:
        model, tokenizer = sspruner.load(name, dtype="float32")
        data = books(model, tokenizer, given.data / "books-val.txt", WINDOWS, seed=SEED)
        reported = books(model, tokenizer, given.data / "books-test.txt", REPORTED, seed=SEED)
        graph = sspruner.trace(model)
        multiple = 8 if axis == "channel" else 1
        scores = sspruner.score(model, scorer, axis=axis, calibration=data)
        curves = sspruner.sensitivity(model, scores, data, multiple_of=multiple).curves
        for sparsity in fractions:
            made = {}
            for label, how in ALLOCATIONS.items():
                by = {"curves": curves} if label == "adaptive" else {}
                made[label] = sspruner.plan(graph, scores, sparsity=sparsity, multiple_of=multiple, **how, **by)
            costs = damages(model, list(made.values()), graph, reported.batches(8))
            label = f"{name} {axis}, {scorer}, {sparsity:.0%}"
            numbers[label] = dict(zip(made, [cost.pruned_perplexity for cost in costs], strict=True))
            cells = [f"{cost.pruned_perplexity:.2f} ({cost.kl:.4f})" for cost in costs]
            cut = made["adaptive"].groups
            sizes = sorted(cut[n].after if n in cut else graph.groups[n].units for n in scores.importance)
            rows.append([label, f"{costs[0].dense_perplexity:.2f}", *cells, f"{sizes[0]} to {sizes[-1]}"])
            progress(" | ".join(rows[-1]))
    head = ["cut", "dense", *ALLOCATIONS, "sizes, adaptive"]
    note = (
        f"seed {SEED}; {WINDOWS} x 256 tokens observed, the first 4,096 for curves, {REPORTED} x 256 reported; one-shot"
    )
    text = table("Perplexity (KL to dense, nats per token) by allocation", head, rows) + "\n\n" + provenance(note)
    deliver(given, "allocation.py", text, numbers)


if __name__ == "__main__":
    main()
