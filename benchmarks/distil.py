"""How many tokens of training bring back how much of what a cut costs, beside the dense model trained in the same way.

    python benchmarks/distil.py --data ../shared/data --threads 1
    python benchmarks/distil.py --quick --results /tmp/quick --data ../shared/data

Each number of tokens is a run of its own, with its own cosine. Loss: half the text, half the dense model's answers
(sspruner.train.distil, alpha 0.5, T 1), on books-train.txt. Scores: windows of books-val.txt; the learning rate is the
one of RATES with the least mean log perplexity on other windows of books-val.txt, over two cuts at the smallest budget.
Reported: windows of books-test.txt. A row that is in --results is not made again, and an interrupted run goes on.
"""

from __future__ import annotations

from pathlib import Path

import torch
from common import deliver, options, progress, provenance, table
from training import Bench, Row, perplexity, ratio, sizes, speed

BUDGETS = (50_000, 100_000, 200_000)  # tokens
CUTS: dict[str, tuple[Row, int]] = {  # label -> arguments of sspruner.prune, and how many of the budgets
    "dense": ({}, 3),
    "head 25%, ghost": ({"axis": "head", "scorer": "ghost", "sparsity": 0.25}, 3),
    "head 50%, ghost": ({"axis": "head", "scorer": "ghost", "sparsity": 0.5}, 3),
    "state 90%, ghost": ({"axis": "state", "scorer": "ghost", "sparsity": 0.9}, 2),
    "state 90%, balanced": ({"axis": "state", "scorer": "balanced", "sparsity": 0.9}, 1),
    "state 75%, ghost": ({"axis": "state", "scorer": "ghost", "sparsity": 0.75}, 1),
    "state 75%, balanced": ({"axis": "state", "scorer": "balanced", "sparsity": 0.75}, 1),
    "state 50%, ghost": ({"axis": "state", "scorer": "ghost", "sparsity": 0.5}, 1),
    "state 50%, balanced": ({"axis": "state", "scorer": "balanced", "sparsity": 0.5}, 1),
}
RATES, TRIED = (3e-4, 1e-3, 3e-3), ("head 25%, ghost", "state 90%, ghost")
LEAST = 0.005  # a share of less damage than this is a ratio to nothing


def choose(bench: Bench, tokens: int, rates: tuple[float, ...]) -> tuple[float, list[list[str]], list[Row]]:
    """The learning rate, the rows of the table that shows why, and the runs."""
    tried = {(cut, rate): bench.distilled(cut, CUTS[cut][0], tokens, rate) for cut in TRIED for rate in rates}
    best = min(rates, key=lambda rate: sum(sum(tried[cut, rate]["chosen"]) for cut in TRIED))
    rows = [[cut, *[f"{perplexity(tried[cut, rate], 'chosen'):.2f}" for rate in rates]] for cut in TRIED]
    return best, rows, list(tried.values())


def main() -> None:
    parser = options(__doc__, "distil.py")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/training"), help="folder of the rows")
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS, help="tokens, rising")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    budgets = (2000, 4000) if given.quick else given.budgets
    cuts = dict(list(CUTS.items())[:2]) | {"state 90%, balanced": CUTS["state 90%, balanced"]} if given.quick else CUTS
    bench = Bench(given.data, given.results, given.quick)
    rate, tried, runs = choose(bench, budgets[0], RATES[:2] if given.quick else RATES)
    progress(f"learning rate {rate:g}")

    before = {label: bench.as_cut(label, cut) for label, (cut, _) in cuts.items()}
    after: dict[tuple[str, int], Row] = {}
    for i, tokens in enumerate(budgets):  # the smallest of all cuts first: a run that is cut short has whole columns
        for label, (cut, count) in cuts.items():
            if i < count:
                after[label, tokens] = bench.distilled(label, cut, tokens, rate)
    dense = perplexity(before["dense"])
    shown, ratios = [], []
    for label in cuts:
        cost = perplexity(before[label]) - dense
        first = [f"{dense + cost:.2f}", f"{100 * cost / dense:+.1f}%" if cost else "–"]
        cells = []
        for tokens in budgets:
            row = after.get((label, tokens))
            share = f" ({100 * (dense + cost - perplexity(row)) / cost:.0f}%)" if row and cost > LEAST * dense else ""
            cells.append(f"{perplexity(row):.2f}{share}" if row else "–")
        shown.append([label, *first, *cells])
        if label != "dense":
            pairs = [(after.get((label, tokens)), after["dense", tokens]) for tokens in budgets]
            cells = [ratio(row, control) if row else "–" for row, control in pairs]
            ratios.append([label, ratio(before[label], before["dense"]), *cells])
    head = [f"{tokens:,} tokens" for tokens in budgets]
    text = table(
        f"Perplexity after training (share of the damage that it took back); dense {dense:.2f}",
        ["cut", "not trained", "damage", *head],
        shown,
    )
    text += "\n" + table(
        "Perplexity of the cut over that of the dense model, both trained for the same tokens (95 % interval)",
        ["cut", "neither trained", *head],
        ratios,
    )
    title = f"Perplexity on books-val.txt after {budgets[0]:,} tokens, by learning rate; chosen: {rate:g}"
    text += "\n" + table(title, ["cut", *[f"{r:g}" for r in (RATES[:2] if given.quick else RATES)]], tried)
    trained = {(row["label"], row["seconds"]): row for row in [*runs, *after.values()]}
    note = f"{sizes(bench)}; shares of at least {LEAST:.1%} damage; {speed([*trained.values()])}"
    numbers = {label: perplexity(row) for label, row in before.items()}
    numbers |= {f"{label}, {tokens}": perplexity(row) for (label, tokens), row in after.items()}
    deliver(given, "distil.py", text + "\n\n" + provenance(note), numbers)


if __name__ == "__main__":
    main()
