"""How many tokens of training bring back how much of what a cut costs, beside the dense model trained in the same way.

    python benchmarks/distil.py --data ../shared/data --threads 1
    python benchmarks/distil.py --quick --results /tmp/quick --data ../shared/data

Each number of tokens is a run of its own, with its own cosine. Loss: half the text, half the dense model's answers
(training.distil, alpha 0.5, T 1), on books-train.txt. Scores: windows of books-val.txt; the learning rate of an
axis is the one of TRIED that is best on other windows of books-val.txt, for one cut at the smallest budget; the dense
model is trained at the same rate. Reported: windows of books-test.txt. A row that is in --results is not made again,
and an interrupted run goes on.
"""

from __future__ import annotations

from pathlib import Path

import torch
from common import deliver, options, progress, provenance, table
from training import Bench, Row, perplexity, ratio, sizes, speed

BUDGETS = (50_000, 100_000, 200_000)  # tokens
CUTS: dict[str, tuple[Row, int]] = {  # label -> arguments of sspruner.prune, and how many of the budgets
    "head 25%, ghost": ({"axis": "head", "scorer": "ghost", "sparsity": 0.25}, 3),
    "head 50%, ghost": ({"axis": "head", "scorer": "ghost", "sparsity": 0.5}, 3),
    "state 90%, ghost": ({"axis": "state", "scorer": "ghost", "sparsity": 0.9}, 2),
    "state 90%, balanced": ({"axis": "state", "scorer": "balanced", "sparsity": 0.9}, 2),
    "state 75%, ghost": ({"axis": "state", "scorer": "ghost", "sparsity": 0.75}, 2),
    "state 75%, balanced": ({"axis": "state", "scorer": "balanced", "sparsity": 0.75}, 1),
    "state 50%, ghost": ({"axis": "state", "scorer": "ghost", "sparsity": 0.5}, 1),
    "state 50%, balanced": ({"axis": "state", "scorer": "balanced", "sparsity": 0.5}, 1),
}
TRIED = {"head": ("head 25%, ghost", (1e-4, 3e-4, 1e-3)), "state": ("state 90%, ghost", (3e-5, 1e-4, 3e-4))}
LEAST = 0.005  # a share of less damage than this is a ratio to nothing


def choose(bench: Bench, tokens: int) -> tuple[dict[str, float], list[list[str]], list[Row]]:
    """Axis -> learning rate; the rows of the table that shows why; and the runs."""
    chosen, rows, runs = {}, [], []
    for axis, (label, rates) in TRIED.items():
        tried = {rate: bench.distilled(label, CUTS[label][0], tokens, rate) for rate in rates}
        chosen[axis] = min(rates, key=lambda rate, tried=tried: perplexity(tried[rate], "chosen"))  # type: ignore[misc]
        shown = [f"{perplexity(row, 'chosen'):.2f} at {rate:g}" for rate, row in tried.items()]
        untrained = bench.as_cut(label, CUTS[label][0])
        rows.append([label, f"{perplexity(untrained, 'chosen'):.2f}", *shown, f"{chosen[axis]:g}"])
        runs += tried.values()
    return chosen, rows, runs


def main() -> None:
    parser = options(__doc__, "distil.py")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/training"), help="folder of the rows")
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS, help="tokens, rising")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    budgets = (2000, 4000) if given.quick else given.budgets
    few = ("head 25%, ghost", "state 90%, balanced")
    cuts = {label: CUTS[label] for label in few} if given.quick else CUTS
    bench = Bench(given.data, given.results, given.quick)
    rates, tried, runs = choose(bench, budgets[0])
    progress(f"learning rates: {rates}")

    dense = bench.as_cut("dense", {})
    before = {label: bench.as_cut(label, cut) for label, (cut, _) in cuts.items()}
    after: dict[tuple[str, int], Row] = {}  # of cuts by label, of the dense model by axis
    for i, tokens in enumerate(budgets):  # the smallest of all cuts first: a run that is cut short has whole columns
        for label, (cut, count) in cuts.items():
            if i < count:
                axis = cut["axis"]
                after[label, tokens] = bench.distilled(label, cut, tokens, rates[axis])
                after[axis, tokens] = bench.distilled("dense", {}, tokens, rates[axis])
    shown, ratios = [], []
    for axis in rates:
        cells = [f"{perplexity(after[axis, t]):.2f}" if (axis, t) in after else "–" for t in budgets]
        shown.append([f"dense, trained as {axis} cuts", f"{perplexity(dense):.2f}", "–", *cells])
    for label, (cut, count) in cuts.items():
        cost = perplexity(before[label]) - perplexity(dense)
        large = cost > LEAST * perplexity(dense)
        cells = []
        for tokens in budgets:
            row = after.get((label, tokens))
            share = f" ({100 * (perplexity(before[label]) - perplexity(row)) / cost:.0f}%)" if row and large else ""
            cells.append(f"{perplexity(row):.2f}{share}" if row else "–")
        shown.append([label, f"{perplexity(before[label]):.2f}", f"{100 * cost / perplexity(dense):+.2f}%", *cells])
        pairs = [(after.get((label, tokens)), after.get((cut["axis"], tokens))) for tokens in budgets]
        cells = [ratio(row, control) if row and control else "–" for row, control in pairs]
        if count:
            ratios.append([label, ratio(before[label], dense), *cells])
    head = [f"{tokens:,} tokens" for tokens in budgets]
    text = table(
        f"Perplexity after training (share of the damage that it took back); dense {perplexity(dense):.2f}",
        ["cut", "not trained", "damage", *head],
        shown,
    )
    text += "\n" + table(
        "Perplexity of the cut over that of the dense model, both trained for the same tokens (95 % interval)",
        ["cut", "neither trained", *head],
        ratios,
    )
    title = f"Perplexity on books-val.txt after {budgets[0]:,} tokens, by learning rate"
    text += "\n" + table(title, ["cut", "not trained", "first", "second", "third", "chosen"], tried)
    trained = {(row["label"], row["seconds"]): row for row in [*runs, *after.values()]}
    note = f"{sizes(bench)}; shares of at least {LEAST:.1%} damage; {speed([*trained.values()])}"
    numbers = {"dense": perplexity(dense)} | {label: perplexity(row) for label, row in before.items()}
    numbers |= {f"{label}, {tokens}": perplexity(row) for (label, tokens), row in after.items()}
    deliver(given, "distil.py", text + "\n\n" + provenance(note), numbers)


if __name__ == "__main__":
    main()
