"""What a refit after the cut is worth: perplexity and KL of the reference models, with and without.

    python benchmarks/refit.py --data ../shared/data --threads 1
    python benchmarks/refit.py --rows "mamba1-books channel" --sparsities 0.5 --data ../shared/data

Calibration and refit on seeded windows of books-val.txt, reported on windows of books-test.txt, which neither saw.
`share` is what is left of the increase of perplexity. The last column is a variant that is not kept: beside the bias,
one factor for each norm's group, least squares as well. With --table the result goes into a page, between its marks.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import books, deliver, options, progress, provenance, table

import sspruner
from sspruner.evaluation.damage import damages

CUTS = {  # label -> reference model, axis, scorer
    "mamba2-books-4m head": ("mamba2-books-4m", "head", "ghost"),
    "mamba2-books-4m head_dim": ("mamba2-books-4m", "head_dim", "ghost"),
    "mamba2-books-4m state": ("mamba2-books-4m", "state", "ghost"),
    "mamba2-books-4m state, balanced": ("mamba2-books-4m", "state", "balanced"),
    "zamba2-books head": ("zamba2-books", "head", "ghost"),
    "zamba2-books head_dim": ("zamba2-books", "head_dim", "ghost"),
    "mamba1-books channel": ("mamba1-books", "channel", "ghost"),
    "mamba1-books state": ("mamba1-books", "state", "ghost"),
    "mamba2-books-4m hidden": ("mamba2-books-4m", "hidden", "magnitude"),
    "zamba2-books block": ("zamba2-books", "block", "block-influence"),
}
SPARSITIES = {"state": (0.9,), "state, balanced": (0.97,), "hidden": (0.1,), "block": (0.2,)}
OTHERS = (0.5,)
SEQ_LEN, WINDOWS, REPORTED, SEED, PER_BATCH = 256, 32, 32, 0, 8


@torch.no_grad()
def scaled(model: Any, plan: sspruner.Plan, data: sspruner.Calibration) -> sspruner.Plan:
    """The plan with one factor for each B/C group on the gated norm's weight, layer by layer, by least squares.

    Each layer is fitted to the dense layer's output on the input that the cut layers before it make.
    """
    graph, updates = sspruner.trace(model), {}
    layers = [site for site in graph.layers if f"{site.path}.norm.weight" in dict(model.named_parameters())]
    for site in layers:
        mixer, groups = model.get_submodule(site.path), site.layout.sizes["group"]
        entering: list[torch.Tensor] = []
        dense: list[torch.Tensor] = []
        parts: list[torch.Tensor] = []  # what each group's channels write: (tokens, groups, hidden size)

        def split(module: Any, args: Any, groups: int = groups, parts: list[torch.Tensor] = parts) -> None:
            u = args[0].flatten(0, 1).unflatten(-1, (groups, -1))  # (tokens, groups, D / groups)
            weight = module.weight.unflatten(-1, (groups, -1))  # (hidden size, groups, D / groups)
            parts.append(torch.einsum("tgd,ogd->tgo", u, weight).double())

        note = mixer.register_forward_pre_hook(lambda m, a, k, into=entering: into.append((a, k)), with_kwargs=True)
        so_far = replace(plan, updates=updates)
        for tokens, _ in data.batches(PER_BATCH):
            with sspruner.masked(model, so_far):
                hook = mixer.out_proj.register_forward_pre_hook(split)
                model(input_ids=tokens, use_cache=False)
                hook.remove()
        note.remove()
        for args, kwargs in entering:
            dense.append(mixer(*args, **kwargs).flatten(0, 1).double())
        written, wanted = torch.cat(parts), torch.cat(dense)  # (tokens, groups, hidden), (tokens, hidden)
        left = torch.einsum("tgo,tho->gh", written, written)
        factors = torch.linalg.solve(left, torch.einsum("tgo,to->g", written, wanted)).float()
        with sspruner.masked(model, plan):
            norm = mixer.norm.weight.detach().clone()
        updates[f"{site.path}.norm.weight"] = norm * factors.repeat_interleave(len(norm) // groups)
    return replace(plan, updates=updates)


def rows(label: str, sparsities: list[float] | None, data: Path) -> list[list[str]]:
    """One row for each cut: none, bias, output, and the norm's scale where there is a gated norm."""
    name, axis, scorer = CUTS[label]
    model, tokenizer = sspruner.load(name, dtype="float32")
    observed = books(model, tokenizer, data / "books-val.txt", WINDOWS, SEQ_LEN, SEED)
    reported = books(model, tokenizer, data / "books-test.txt", REPORTED, SEQ_LEN, SEED)
    graph = sspruner.trace(model)
    scores = sspruner.score(model, scorer, axis=axis, calibration=observed)
    found = []
    for sparsity in sparsities or SPARSITIES.get(label.partition(" ")[2], OTHERS):
        plan = sspruner.plan(graph, scores, sparsity=sparsity)
        plans = {"none": plan}
        plans |= {k: sspruner.refit(model, plan, k, calibration=observed).plan for k in ("bias", "output")}
        if axis in ("head", "head_dim"):
            plans["norm's scale"] = (
                scaled(model, plan, observed) if scorer == "ghost" and "mamba1" not in name else plan
            )
        costs = dict(zip(plans, damages(model, list(plans.values()), graph, reported.batches(PER_BATCH)), strict=True))
        dense, none = costs["none"].dense_perplexity, costs["none"].pruned_perplexity
        cells = [f"{cost.pruned_perplexity:.2f} ({cost.kl:.4f})" for cost in costs.values()]
        left = [f"{(costs[k].pruned_perplexity - dense) / (none - dense):.2f}" for k in ("bias", "output")]
        found.append([f"{label}, {sparsity:.0%}", f"{dense:.2f}", *[*cells, "–"][:4], *left])
        progress(" | ".join(found[-1]))
    return found


def main() -> None:
    parser = options(__doc__, "refit.py")
    parser.add_argument("--rows", nargs="+", choices=CUTS, default=list(CUTS))
    parser.add_argument("--sparsities", type=float, nargs="+", help="default: by axis")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    labels = given.rows[:1] if given.quick else given.rows
    found = [row for label in labels for row in rows(label, given.sparsities, given.data)]
    head = ["cut", "dense", "none", "bias", "output", "norm's scale", "share left, bias", "share left, output"]
    note = (
        f"seed {SEED}; {WINDOWS} x {SEQ_LEN} tokens observed and fitted, {REPORTED} x {SEQ_LEN} reported; one-shot "
        "scores of ghost, of balanced, of magnitude (hidden) and of block-influence (block)"
    )
    text = table("Refit: perplexity (KL to dense, nats per token)", head, found) + "\n\n" + provenance(note)
    deliver(given, "refit.py", text, [dict(zip(head, row, strict=True)) for row in found])


if __name__ == "__main__":
    main()
