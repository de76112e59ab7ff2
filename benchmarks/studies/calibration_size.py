"""How much calibration text a cut wants, and which: 512 to 65,536 tokens, books, WikiText-2, the model's own.

    python benchmarks/calibration_size.py --threads 1 --data ../shared/data --table docs/benchmarks.md

State of mamba2-books-4m, GHOST and balanced, one-shot. Windows of 256 tokens; of the model's own text the largest
sample is drawn once, smaller ones are parts of it. Small samples are drawn with several seeds.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import books, cuts, deliver, options, progress, provenance, table

import sspruner
from sspruner.evaluation.damage import damages

ROWS = (("ghost", (0.75, 0.9)), ("balanced", (0.9, 0.97)))
SOURCES = {"books-val": "books-val.txt", "WikiText-2": "wikitext2-valid.txt", "self": "self"}
TESTS = {"books": "books-test.txt", "WikiText-2": "wikitext2-test.txt"}
TOKENS, LENGTH, REPORTED = (512, 2048, 8192), 256, 12
SEEDS = {512: 3, 2048: 3}  # elsewhere one


def samples(model: Any, tokenizer: Any, source: str, folder: Path, tokens: int, seed: int, drawn: Any) -> Any:
    """Calibration windows; of the model's own text a part of what was drawn."""
    count = tokens // LENGTH
    if source != "self":
        return books(model, tokenizer, folder / SOURCES[source], count, LENGTH, seed)
    part = slice(seed * count, (seed + 1) * count)
    return replace(drawn, tokens=drawn.tokens[part], mask=drawn.mask[part])


def main() -> None:
    parser = options(__doc__, "calibration_size.py")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="sizes of the calibration text")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    sizes = given.tokens[:2] if given.quick else given.tokens
    model, tokenizer = sspruner.load("mamba2-books-4m", dtype="float32")
    graph = sspruner.trace(model)
    reported = {n: books(model, tokenizer, given.data / file, REPORTED, LENGTH) for n, file in TESTS.items()}
    largest = max(tokens * SEEDS.get(tokens, 1) for tokens in sizes)
    drawn = sspruner.calibration("self", model, tokenizer, samples=largest // LENGTH, seq_len=LENGTH, held_out=0)
    dense: dict[str, float] = {}
    found: dict[str, dict[str, dict[int, list[float]]]] = {}
    for source in SOURCES:
        for tokens in sizes:
            for seed in range(SEEDS.get(tokens, 1)):
                data = samples(model, tokenizer, source, given.data, tokens, seed, drawn)
                plans = cuts(model, data, ROWS)
                for test, text in reported.items():
                    costs = damages(model, list(plans.values()), graph, text.batches(8))
                    dense[test] = costs[0].dense_perplexity
                    for (scorer, sparsity), cost in zip(plans, costs, strict=True):
                        row = found.setdefault(f"{scorer}, {sparsity:.0%}, on {test}", {}).setdefault(source, {})
                        row.setdefault(tokens, []).append(100 * (cost.pruned_perplexity / cost.dense_perplexity - 1))
            progress(f"{source}, {tokens} tokens")
    rows = [
        [f"{label}, from {source}", *[cell(values) for values in by_size.values()]]
        for label, by_source in found.items()
        for source, by_size in by_source.items()
    ]
    shown = ", ".join(f"{name} {value:.2f}" for name, value in dense.items())
    title = f"Increase of perplexity, %, by calibration tokens (dense: {shown})"
    note = (
        f"{REPORTED} x {LENGTH} tokens reported of each text; mean ± standard deviation over "
        f"{' and '.join(f'{seeds} seeds at {size:,} tokens' for size, seeds in SEEDS.items())}, else seed 0"
    )
    text = table(title, ["cut and calibration", *[f"{t:,}" for t in sizes]], rows) + "\n\n" + provenance(note)
    deliver(given, "calibration_size.py", text, found)


def cell(values: list[float]) -> str:
    """Mean, ± standard deviation of several."""
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
