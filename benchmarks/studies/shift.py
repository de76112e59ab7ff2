"""Whether random sub-networks want a correction of their activations: branch scales and a mean bias, not trained.

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
from common import Made, Subject, progress, table

import sspruner
from sspruner.evaluation.damage import mean_loss
from sspruner.scoring.scores import Scores

ENDS = ("*layers.0.*", "*layers.5.*")
CUTS = {
    "mamba2-books-4m, head": (),
    "mamba2-books-4m, head, ends whole": ENDS,
    "mamba2-books-4m, head_dim, ends whole": ENDS,
    **dict.fromkeys(("mamba2-books-4m, state", "zamba2-books, head", "zamba2-books, mlp"), ()),
    **dict.fromkeys(("zamba2-books, attn_head", "mamba1-books, channel"), ()),
}
KEEPS, DRAWS, POWERS = (0.75, 0.5), 2, (0.0, -0.5, 0.5, 1.0)
WRITERS = ("out_proj.weight", "down_proj.weight", "o_proj.weight", "output_linear.weight")


@torch.no_grad()
def scaled(model: Any, names: set[str], factor: float) -> Any:
    """Return a copy of a cut model whose branches are so much stronger."""
    made = copy.deepcopy(model)
    for name, parameter in made.named_parameters():
        if name in names:
            parameter *= factor
    return made


def losses(subject: Subject, axis: str, plan: Any, keep: float, texts: Any) -> list[float]:
    """Return the mean loss of a cut with each power, and with a mean bias (of the state there is none)."""
    model, graph, (reported, observed) = subject.model, subject.graph, texts
    names = {m.tensor for n in plan.groups for m in graph.groups[n].members if m.tensor.endswith(WRITERS)}
    cut = sspruner.apply(copy.deepcopy(model), plan)
    versions = [scaled(cut, names, keep**-power) for power in POWERS]
    if axis != "state":
        refit = sspruner.refit(model, plan, "bias", calibration=observed).plan
        versions.append(sspruner.apply(copy.deepcopy(model), refit))
    return [mean_loss(version, reported.batches(8)) for version in versions]


def tables(s: Any) -> Made:
    """Return a row for each cut and fraction that is kept."""
    rows = []
    for label, ignore in CUTS.items():
        name, axis = label.split(", ")[:2]
        if s.quick and label not in ("mamba2-books-4m, head", "mamba2-books-4m, state"):
            continue
        subject = Subject(name, s.data)
        texts = [subject.text(f"books-{part}.txt", 2 if s.quick else 8) for part in ("test", "val")]
        dense = mean_loss(subject.model, texts[0].batches(8))
        for keep in KEEPS:
            found = []
            for seed in range(DRAWS):
                generator, groups = torch.Generator().manual_seed(seed), subject.graph.on_axis(axis).items()
                scores = Scores({n: torch.rand(g.groups, g.units, generator=generator) for n, g in groups})
                plan = sspruner.plan(subject.graph, scores, sparsity=1 - keep, ignore=ignore)
                found.append(losses(subject, axis, plan, keep, texts))
            cells = [f"{math.exp(fmean(draws) - dense):.3f}" for draws in zip(*found, strict=True)]
            rows.append([f"{label}, keep {keep:g}", *cells, *["–"] * (axis == "state")])
            progress(" ".join(rows[-1]))
    head = ["axis", "as sliced", "(n/q)^−½", "(n/q)^½", "n/q", "mean bias"]
    text = table("Perplexity over the dense model's, with branches so much stronger", head, rows)
    return text, f"seeds 0 to {DRAWS - 1}; 8 windows of 256 tokens reported, as many observed for the bias", None
