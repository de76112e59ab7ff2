"""How many tokens of training bring back how much of what a cut costs, beside the dense model trained in the same way.

Each number of tokens is a run of its own, with its own cosine. Loss: half the text, half the dense model's answers
(training.distil, alpha 0.5, T 1), on books-train.txt. Scores: windows of books-val.txt; the learning rate of an axis is
the one of TRIED that is best on other windows of books-val.txt, for one cut at the smallest budget; the dense model is
trained at the same rate. Reported: windows of books-test.txt.
"""

from __future__ import annotations

from typing import Any

from common import Made, progress, table

from studies.training import Bench, Row, perplexity, ratio, speed

BUDGETS_OF = {  # (axis, fraction, scorer) -> how many of the budgets
    ("head", 0.25, "ghost"): 3, ("head", 0.5, "ghost"): 3, ("state", 0.9, "ghost"): 2, ("state", 0.9, "balanced"): 2,
    ("state", 0.75, "ghost"): 2, ("state", 0.75, "balanced"): 1, ("state", 0.5, "ghost"): 1,
    ("state", 0.5, "balanced"): 1,
}  # fmt: skip
CUTS: dict[str, tuple[Row, int]] = {  # label -> arguments of sspruner.prune, and how many of the budgets
    f"{axis} {part:.0%}, {scorer}": ({"axis": axis, "scorer": scorer, "sparsity": part}, count)
    for (axis, part, scorer), count in BUDGETS_OF.items()
}
TRIED = {"head": ("head 25%, ghost", (1e-4, 3e-4, 1e-3)), "state": ("state 90%, ghost", (3e-5, 1e-4, 3e-4))}
LEAST = 0.005  # a share of less damage than this is a ratio to nothing


def choose(bench: Bench, tokens: int) -> tuple[dict[str, float], list[list[str]], list[Row]]:
    """Return axis -> learning rate; the rows of the table that shows why; and the runs."""
    chosen, rows, runs = {}, [], []
    for axis, (label, rates) in TRIED.items():
        tried = {rate: bench.distilled(label, CUTS[label][0], tokens, rate) for rate in rates}
        chosen[axis] = min(rates, key=lambda rate, tried=tried: perplexity(tried[rate], "chosen"))  # type: ignore[misc]
        shown = [f"{perplexity(row, 'chosen'):.2f} at {rate:g}" for rate, row in tried.items()]
        untrained = bench.as_cut(label, CUTS[label][0])
        rows.append([label, f"{perplexity(untrained, 'chosen'):.2f}", *shown, f"{chosen[axis]:g}"])
        runs += tried.values()
    return chosen, rows, runs


def tables(s: Any) -> Made:
    """Return what training takes back, ratios to the dense model, and how rates were chosen. Settings: budgets."""
    few = ("head 25%, ghost", "state 90%, balanced")
    cuts, bench = {label: cut for label, cut in CUTS.items() if not s.quick or label in few}, Bench(s)
    rates, tried, runs = choose(bench, s.budgets[0])
    dense = bench.as_cut("dense", {})
    before = {label: bench.as_cut(label, cut) for label, (cut, _) in cuts.items()}
    after: dict[tuple[str, int], Row] = {}  # of cuts by label, of the dense model by axis
    for i, tokens in enumerate(s.budgets):  # the smallest of all cuts first: what is cut short has whole columns
        for label, (cut, count) in cuts.items():
            if i < count:
                after[label, tokens] = bench.distilled(label, cut, tokens, rates[cut["axis"]])
                after[cut["axis"], tokens] = bench.distilled("dense", {}, tokens, rates[cut["axis"]])
    shown, ratios = [], []
    for axis in rates:
        cells = [f"{perplexity(after[axis, t]):.2f}" if (axis, t) in after else "–" for t in s.budgets]
        shown.append([f"dense, trained as {axis} cuts", f"{perplexity(dense):.2f}", "–", *cells])
    for label, (cut, _) in cuts.items():
        cost = perplexity(before[label]) - perplexity(dense)
        rows = [after.get((label, tokens)) for tokens in s.budgets]
        back = [100 * (perplexity(before[label]) - perplexity(row)) / cost if row else 0.0 for row in rows]
        shares = [f" ({part:.0f}%)" if cost > LEAST * perplexity(dense) else "" for part in back]
        cells = [f"{perplexity(r):.2f}{share}" if r else "–" for r, share in zip(rows, shares, strict=True)]
        damage = f"{100 * cost / perplexity(dense):+.2f}%"
        shown.append([label, f"{perplexity(before[label]):.2f}", damage, *cells])
        controls = [after.get((cut["axis"], tokens)) for tokens in s.budgets]
        cells = [ratio(r, control) if r and control else "–" for r, control in zip(rows, controls, strict=True)]
        ratios.append([label, ratio(before[label], dense), *cells])
        progress(label)
    head = [f"{tokens:,} tokens" for tokens in s.budgets]
    title = f"Perplexity after training (share of the damage that it took back); dense {perplexity(dense):.2f}"
    text = table(title, ["cut", "not trained", "damage", *head], shown)
    title = "Perplexity of the cut over that of the dense model, both trained for the same tokens (95 % interval)"
    text += "\n" + table(title, ["cut", "neither trained", *head], ratios)
    title = f"Perplexity on books-val.txt after {s.budgets[0]:,} tokens, by learning rate"
    text += "\n" + table(title, ["cut", "not trained", "first", "second", "third", "chosen"], tried)
    trained = {(row["label"], row["seconds"]): row for row in [*runs, *after.values()]}
    return text, f"{bench.note()}; shares of at least {LEAST:.1%} damage; {speed([*trained.values()])}", None
