"""Perplexity by position, far beyond the length that was calibrated on: does a smaller state forget what is far back?

    python benchmarks/positions.py --threads 1 --data ../shared/data --table docs/benchmarks.md

Scores from 8,192 tokens of books-val.txt in windows of 128 and of 256 tokens; measured on windows of 2,048 tokens of
books-test.txt. A cell is the perplexity of the cut model over that of the dense one at the same positions.
"""

from __future__ import annotations

from typing import Any

import torch
from common import MODELS, books, cuts, deliver, interval, options, progress, provenance, state_cuts, table

import sspruner
from sspruner.evaluation.damage import log_probabilities

CALIBRATED, LENGTHS, LENGTH, WINDOWS, SEED = 8192, (128, 256), 2048, 8, 0
ENDS = (128, 256, 512, 1024, 2048)


@torch.no_grad()
def losses(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each predicted token, nats: fp64 (windows, T - 1)."""
    rows = []
    for window in windows.split(1):
        logp = log_probabilities(model, window, torch.ones_like(window))  # (1, T-1, V)
        rows.append(-logp.gather(-1, window[:, 1:, None]).squeeze(-1).double())
    return torch.cat(rows)


def buckets(values: torch.Tensor) -> list[torch.Tensor]:
    """Means over runs of positions, by window: [(windows,)]."""
    starts = (0, *ENDS[:-1])
    return [values[:, max(start - 1, 0) : end - 1].mean(1) for start, end in zip(starts, ENDS, strict=True)]


def main() -> None:
    parser = options(__doc__, "positions.py")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    texts, numbers = [], {}
    for name in given.models[:1] if given.quick else given.models:
        model, tokenizer = sspruner.load(name, dtype="float32")
        windows = books(
            model, tokenizer, given.data / "books-test.txt", 2 if given.quick else WINDOWS, LENGTH, SEED
        ).tokens
        dense = losses(model, windows)
        rows = state_cuts(name)
        found = []
        for length in LENGTHS:
            data = books(model, tokenizer, given.data / "books-val.txt", CALIBRATED // length, length, SEED)
            for (scorer, sparsity), plan in cuts(model, data, rows).items():
                with sspruner.masked(model, plan):
                    more = buckets(losses(model, windows) - dense)
                label = f"{scorer}, {sparsity:.0%}, calibrated at {length}"
                found.append([label, *[interval(values) for values in more]])
                numbers.setdefault(name, {})[label] = [float(values.mean().exp()) for values in more]
                progress(" | ".join(found[-1]))
        by_position = [f"{float(values.mean().exp()):.2f}" for values in buckets(dense)]
        head = ["cut", *[f"{a + 1} to {b}" for a, b in zip((0, *ENDS[:-1]), ENDS, strict=True)]]
        title = f"{name}: perplexity over the dense model's, by position (95 % interval over windows)"
        texts.append(table(title, head, [["dense, perplexity", *by_position], *found]))
    note = f"seed {SEED}; {CALIBRATED} tokens observed, {WINDOWS} windows of {LENGTH} reported; one-shot scores"
    deliver(given, "positions.py", "\n\n".join(texts) + "\n\n" + provenance(note), numbers)


if __name__ == "__main__":
    main()
