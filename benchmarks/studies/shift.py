"""Whether random sub-networks want a correction of their activations: branch scales and a mean bias, not trained.

    python benchmarks/shift.py --data ../shared/data --threads 1

A fraction of the units of an axis goes at random, in all blocks or all but the first and last. What writes to the
residual stream in their layers is multiplied by (n / q) ** e, where q of n units stay, or gets the mean of what went
as a bias (sspruner.refit "bias", observed on books-val.txt). Perplexity on windows of books-test.txt, over that of the
dense model: the geometric mean over draws. `as sliced` is e = 0: what a norm over the units does is in it.
"""

from __future__ import annotations

import copy
import math
from statistics import fmean
from typing import Any

import torch
from common import books, deliver, options, progress, provenance, table

import sspruner
from sspruner.evaluation.damage import mean_loss
from sspruner.scoring.scores import Scores

ENDS = ("*layers.0.*", "*layers.5.*")
CUTS = {
    "mamba2-books-4m, head": ("mamba2-books-4m", "head", ()),
    "mamba2-books-4m, head, ends whole": ("mamba2-books-4m", "head", ENDS),
    "mamba2-books-4m, head_dim, ends whole": ("mamba2-books-4m", "head_dim", ENDS),
    "mamba2-books-4m, state": ("mamba2-books-4m", "state", ()),
    "zamba2-books, head": ("zamba2-books", "head", ()),
    "zamba2-books, mlp": ("zamba2-books", "mlp", ()),
    "zamba2-books, attn_head": ("zamba2-books", "attn_head", ()),
    "mamba1-books, channel": ("mamba1-books", "channel", ()),
}
KEEPS, DRAWS, POWERS = (0.75, 0.5), 2, (0.0, -0.5, 0.5, 1.0)
WRITERS = ("out_proj.weight", "down_proj.weight", "o_proj.weight", "output_linear.weight")


@torch.no_grad()
def scaled(model: Any, names: set[str], factor: float) -> Any:
    """A copy of a cut model whose branches are so much stronger."""
    made = copy.deepcopy(model)
    for name, parameter in made.named_parameters():
        if name in names:
            parameter *= factor
    return made


def main() -> None:
    parser = options(__doc__, "shift.py")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    few = {name: CUTS[name] for name in ("mamba2-books-4m, head", "mamba2-books-4m, state")}
    rows, numbers = [], {}
    for label, (name, axis, ignore) in (few if given.quick else CUTS).items():
        model, tokenizer = sspruner.load(name, dtype="float32")
        graph = sspruner.trace(model)
        windows = 2 if given.quick else 8
        reported, observed = (
            books(model, tokenizer, given.data / f"books-{part}.txt", windows) for part in ("test", "val")
        )
        dense = mean_loss(model, reported.batches(8))
        for keep in KEEPS:
            found: dict[str, list[float]] = {}
            for seed in range(DRAWS):
                generator = torch.Generator().manual_seed(seed)
                groups = graph.on_axis(axis).items()
                scores = {n: torch.rand(g.groups, g.units, generator=generator) for n, g in groups}
                plan = sspruner.plan(graph, Scores(scores), sparsity=1 - keep, ignore=ignore)
                names = {m.tensor for n in plan.groups for m in graph.groups[n].members if m.tensor.endswith(WRITERS)}
                cut = sspruner.apply(copy.deepcopy(model), plan)
                for power in POWERS:
                    loss = mean_loss(scaled(cut, names, keep**-power), reported.batches(8))
                    found.setdefault(f"{power:g}", []).append(loss - dense)
                if axis != "state":  # what goes is not an input of out_proj
                    refit = sspruner.refit(model, plan, "bias", calibration=observed).plan
                    biased = sspruner.apply(copy.deepcopy(model), refit)
                    found.setdefault("bias", []).append(mean_loss(biased, reported.batches(8)) - dense)
            ratios = {what: math.exp(fmean(values)) for what, values in found.items()}
            numbers[f"{label}, {keep}"] = ratios
            rows.append([f"{label}, keep {keep:g}", *(f"{r:.3f}" for r in ratios.values()), *["–"] * (axis == "state")])
            progress(" ".join(rows[-1]))
    head = ["axis", "as sliced", "(n/q)^−½", "(n/q)^½", "n/q", "mean bias"]
    text = table("Perplexity over the dense model's, with branches so much stronger", head, rows)
    note = f"seeds 0 to {DRAWS - 1}; 8 windows of 256 tokens reported, as many observed for the bias"
    deliver(given, "shift.py", text + "\n\n" + provenance(note), numbers)


if __name__ == "__main__":
    main()
