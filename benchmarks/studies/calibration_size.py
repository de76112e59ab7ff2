"""How much calibration text a cut wants, and which: 512 to 8,192 tokens, books, WikiText-2, the model's own.

State of mamba2-books-4m, GHOST and balanced, one-shot. Windows of 256 tokens; of the model's own text the largest
sample is drawn once, smaller ones are parts of it. Small samples are drawn with several seeds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from common import Made, Subject, costs, progress, spread, table

CUTS = (("ghost", 0.75), ("ghost", 0.9), ("balanced", 0.9), ("balanced", 0.97))
SOURCES = {"books-val": "books-val.txt", "WikiText-2": "wikitext2-valid.txt", "self": "self"}
TESTS = {"books": "books-test.txt", "WikiText-2": "wikitext2-test.txt"}
TOKENS, LENGTH, REPORTED = (512, 2048, 8192), 256, 12
SEEDS = {512: 3, 2048: 3}  # elsewhere one


def tables(s: Any) -> Made:
    """Return the increase of perplexity of every cut, by source and size of the calibration text."""
    sizes, subject = getattr(s, "sizes", TOKENS), Subject("mamba2-books-4m", s.data)
    reported = {name: subject.text(file, REPORTED) for name, file in TESTS.items()}
    drawn = subject.text("self", max(tokens * SEEDS.get(tokens, 1) for tokens in sizes) // LENGTH)
    dense: dict[str, float] = {}
    found: dict[str, dict[str, dict[int, list[float]]]] = {}
    for source, file in SOURCES.items():
        for tokens, seed in [(t, seed) for t in sizes for seed in range(SEEDS.get(t, 1))]:
            count = tokens // LENGTH
            part = slice(seed * count, (seed + 1) * count)
            own = replace(drawn, tokens=drawn.tokens[part], mask=drawn.mask[part])
            data = own if source == "self" else subject.text(file, count, seed=seed)
            plans = [subject.plan(data, scorer, sparsity=sparsity) for scorer, sparsity in CUTS]
            for test, text in reported.items():
                first, others = subject.measure([subject.masked(plan) for plan in plans], text)
                dense[test] = costs(first)[0]
                for (scorer, sparsity), values in zip(CUTS, others, strict=True):
                    row = found.setdefault(f"{scorer}, {sparsity:.0%}, on {test}", {}).setdefault(source, {})
                    row.setdefault(tokens, []).append(100 * (costs(values)[0] / dense[test] - 1))
            progress(f"{source}, {tokens} tokens, seed {seed}")
    rows = [
        [f"{label}, from {source}", *[spread(values) for values in by_size.values()]]
        for label, by_source in found.items()
        for source, by_size in by_source.items()
    ]
    shown = ", ".join(f"{name} {value:.2f}" for name, value in dense.items())
    title = f"Increase of perplexity, %, by calibration tokens (dense: {shown})"
    note = (
        f"{REPORTED} x {LENGTH} tokens reported of each text; mean ± standard deviation over "
        f"{' and '.join(f'{seeds} seeds at {size:,} tokens' for size, seeds in SEEDS.items())}, else seed 0"
    )
    return table(title, ["cut and calibration", *[f"{t:,}" for t in sizes]], rows), note, found
