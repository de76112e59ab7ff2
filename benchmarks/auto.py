"""The scorer that costs least on calibration text, against every scorer on other text.

    python benchmarks/auto.py --threads 1 --data ../shared/data --table docs/benchmarks.md

All scorers that `--scorer auto` would try, one-shot, on 32 x 256 tokens of books-val.txt, which also choose; reported
on 64 x 256 of books-test.txt. The last rows: what auto took, and its perplexity over that of the best of them there.
"ghost, output" is shown beside them: auto tries every scorer with its defaults, and does not try this one.
"""

from __future__ import annotations

from typing import Any

import torch
from common import books, deliver, options, progress, provenance, table

import sspruner
from sspruner.evaluation.damage import damages
from sspruner.scoring.choice import candidates

CUTS = (("mamba2-books-4m", "state"), ("mamba2-books-4m", "head"), ("mamba1-books", "state"))
SPARSITIES = {"state": (0.75, 0.9), "head": (0.5,)}
WINDOWS, REPORTED, SEED = 16, 32, 0
BESIDE = {"ghost, output": ("ghost", {"variant": "output"})}  # label -> scorer, options


def main() -> None:
    parser = options(__doc__, "auto.py")
    parser.add_argument("--cuts", type=int, nargs="+", default=range(len(CUTS)), help="some of the cuts, by number")
    given = parser.parse_args()
    chosen_cuts = [CUTS[i] for i in given.cuts]
    if given.threads:
        torch.set_num_threads(given.threads)
    texts, numbers = [], {}
    for name, axis in chosen_cuts[:1] if given.quick else chosen_cuts:
        model, tokenizer = sspruner.load(name, dtype="float32")
        data = books(model, tokenizer, given.data / "books-val.txt", WINDOWS, seed=SEED)
        reported = books(model, tokenizer, given.data / "books-test.txt", REPORTED, seed=SEED)
        graph, scores = sspruner.trace(model), {}
        rows_asked: dict[str, Any] = {scorer: (scorer, None) for scorer in candidates(axis, "select")} | BESIDE
        for label, (scorer, how) in rows_asked.items():
            try:
                scores[label] = sspruner.score(model, scorer, axis=axis, options=how, calibration=data)
            except sspruner.InputError as error:
                progress(f"{name}, {label}: {error}")
        found: dict[str, list[float]] = {scorer: [] for scorer in scores}
        chosen: list[list[str]] = [[], []]
        for sparsity in SPARSITIES[axis]:
            plans = {n: sspruner.plan(graph, own, sparsity=sparsity) for n, own in scores.items()}
            seen, test = (damages(model, list(plans.values()), graph, d.batches(8)) for d in (data, reported))
            by_scorer = dict(zip(plans, test, strict=True))
            for scorer, cost in by_scorer.items():
                found[scorer].append(cost.pruned_perplexity)
            tried = [
                (n, on_val, on_test) for n, on_val, on_test in zip(plans, seen, test, strict=True) if n not in BESIDE
            ]
            took = min(tried, key=lambda row: row[1].pruned_perplexity)[0]
            best = min(on_test.pruned_perplexity for _, _, on_test in tried)
            chosen[0].append(took)
            chosen[1].append(
                f"{by_scorer[took].pruned_perplexity:.2f} ({by_scorer[took].pruned_perplexity / best:.4f})"
            )
            progress(f"{name} {axis} {sparsity:.0%}: {took} {chosen[1][-1]}")
        rows = [[scorer, *[f"{value:.2f}" for value in values]] for scorer, values in found.items()]
        rows += [["auto takes", *chosen[0]], ["auto (over the best here)", *chosen[1]]]
        numbers[f"{name} {axis}"] = found | {"auto": chosen}
        title = f"{name}, axis {axis}: perplexity on books-test; dense {test[0].dense_perplexity:.2f}"
        texts.append(table(title, ["scorer", *[f"{s:.0%}" for s in SPARSITIES[axis]]], rows))
    note = f"seed {SEED}; {WINDOWS} x 256 tokens observed and chosen on, {REPORTED} x 256 reported; one-shot scores"
    deliver(given, "auto.py", "\n\n".join(texts) + "\n\n" + provenance(note), numbers)


if __name__ == "__main__":
    main()
