"""Published increases of perplexity beside ours, for the same fractions of the state removed.

    python benchmarks/published.py --data ../shared/data

Published: GHOST's authors (arXiv 2602.11408), Mamba2-1.3B on WikiText-2, dense 13.17. Ours: mamba2-books-4m on test
books, one-shot scores, masked. Other models, other texts: a column is to be read down, not across.
"""

from __future__ import annotations

import torch
from common import books, deliver, options, provenance, table

import sspruner
from sspruner.evaluation.damage import damages

CUTS = (0.1, 0.3, 0.5, 0.7, 0.9)
DENSE = 13.17
PUBLISHED = {
    "magnitude": (427.7, 22.39, 29.34, 39.96, 69.49),
    "random": (13.52, 15.04, 17.77, 30.14, 64.21),
    "taylor": (13.18, 13.26, 13.94, 4255, 4690),
    "ghost": (13.24, 13.51, 14.23, 16.16, 25.07),
}


def main() -> None:
    given = options(__doc__, "published.py").parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    observed, reported = (1, 2) if given.quick else (32, 32)
    model, tokenizer = sspruner.load("mamba2-books-4m", dtype="float32")
    scores = sspruner.score(
        model, list(PUBLISHED), calibration=books(model, tokenizer, given.data / "books-val.txt", observed)
    )
    graph = sspruner.trace(model)
    plans = [sspruner.plan(graph, scores[name], sparsity=cut) for name in PUBLISHED for cut in CUTS]
    text = books(model, tokenizer, given.data / "books-test.txt", reported)
    found = iter(damages(model, plans, graph, text.batches(8)))
    rows, numbers = [], {}
    for name, perplexities in PUBLISHED.items():
        for cut, theirs in zip(CUTS, perplexities, strict=True):
            cost = next(found)
            ours = cost.pruned_perplexity / cost.dense_perplexity - 1
            numbers[f"{name} {cut}"] = {"published": theirs / DENSE - 1, "ours": ours}
            rows.append([f"{name}, {cut:.0%}", f"+{100 * (theirs / DENSE - 1):.1f} %", f"{100 * ours:+.1f} %"])
    head = ["scorer, state removed", "published: Mamba2-1.3B, WikiText-2", "ours: mamba2-books-4m, test books"]
    note = (
        f"seed 0; {observed} x 256 tokens observed, {reported} x 256 reported; published: arXiv 2602.11408, dense 13.17"
    )
    made = table("Increase of perplexity, published and ours", head, rows) + f"\n\n{provenance(note)}"
    deliver(given, "published.py", made, numbers)


if __name__ == "__main__":
    main()
