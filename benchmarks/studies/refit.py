"""What a refit after the cut is worth: perplexity and KL of the reference models, with and without.

Calibration and refit on seeded windows of books-val.txt, reported on windows of books-test.txt, which neither saw.
`share` is what is left of the increase of perplexity. The last column is a variant that is not kept: beside the bias,
one factor for each norm's group, least squares as well.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from common import Made, Subject, costs, progress, table

import sspruner

CUTS = (  # reference model, axis, scorer, sparsity
    ("mamba2-books-4m", "head", "ghost", 0.5),
    ("mamba2-books-4m", "head_dim", "ghost", 0.5),
    ("mamba2-books-4m", "state", "ghost", 0.9),
    ("mamba2-books-4m", "state", "balanced", 0.97),
    ("zamba2-books", "head", "ghost", 0.5),
    ("zamba2-books", "head_dim", "ghost", 0.5),
    ("mamba1-books", "channel", "ghost", 0.5),
    ("mamba1-books", "state", "ghost", 0.9),
    ("mamba2-books-4m", "hidden", "magnitude", 0.1),
    ("zamba2-books", "block", "block-influence", 0.2),
)
WINDOWS, REPORTED = 32, 32


@torch.no_grad()
def scaled(model: Any, plan: sspruner.Plan, data: sspruner.Calibration) -> sspruner.Plan:
    """The plan with one factor for each B/C group on the gated norm's weight, layer by layer, by least squares.

    Each layer is fitted to the dense layer's output on the input that the cut layers before it make.
    """
    graph, updates = sspruner.trace(model), dict[str, torch.Tensor]()
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
        for tokens, _ in data.batches(8):
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


def tables(s: Any) -> Made:
    """Return a row for each cut: none, bias, output, and the norm's scale where there is a gated norm."""
    found, windows = [], 4 if s.quick else WINDOWS
    for name, axis, scorer, sparsity in CUTS[: 1 if s.quick else None]:
        subject = Subject(name, s.data)
        data, text = subject.text("books-val.txt", windows), subject.text("books-test.txt", windows)
        plan = subject.plan(data, scorer, axis=axis, sparsity=sparsity)
        plans = [plan, *[sspruner.refit(subject.model, plan, k, calibration=data).plan for k in ("bias", "output")]]
        plans += [scaled(subject.model, plan, data)] if axis in ("head", "head_dim") else []
        first, others = subject.measure([subject.masked(made) for made in plans], text)
        (dense, _), cells = costs(first), [costs(values) for values in others]
        left = [f"{(cells[i][0] - dense) / (cells[0][0] - dense):.2f}" for i in (1, 2)]
        label = f"{name} {axis}{', balanced' * (scorer == 'balanced')}, {sparsity:.0%}"
        shown = [*[f"{perplexity:.2f} ({kl:.4f})" for perplexity, kl in cells], "–"][:4]
        found.append([label, f"{dense:.2f}", *shown, *left])
        progress(" | ".join(found[-1]))
    head = ["cut", "dense", "none", "bias", "output", "norm's scale", "share left, bias", "share left, output"]
    note = (
        f"seed 0; {WINDOWS} x 256 tokens observed and fitted, {REPORTED} x 256 reported; one-shot "
        "scores of ghost, of balanced, of magnitude (hidden) and of block-influence (block)"
    )
    return table("Refit: perplexity (KL to dense, nats per token)", head, found), note, None
