"""Change a plan in ways that were tried and are not offered: experiments name them in a cell."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from common import Subject

import sspruner

WRITERS = ("out_proj.weight", "down_proj.weight", "o_proj.weight", "output_linear.weight")


@torch.no_grad()
def branch_scale(subject: Subject, plan: sspruner.Plan, power: float) -> sspruner.Plan:
    """Multiply what writes to the residual stream in cut layers by (n / q) ** power, where q of n units stay."""
    updates = {}
    for name, reduction in plan.groups.items():
        for tensor in {m.tensor for m in subject.graph.groups[name].members if m.tensor.endswith(WRITERS)}:
            scale = (reduction.before / reduction.after) ** power
            updates[tensor] = subject.model.get_parameter(tensor).detach() * scale
    return replace(plan, updates=updates)


@torch.no_grad()
def norm_scale(subject: Subject, plan: sspruner.Plan, data: sspruner.Calibration) -> sspruner.Plan:
    """Multiply each B/C group of the gated norm's weight by one factor, layer by layer, by least squares.

    Each layer is fitted to the dense layer's output on the input that the cut layers before it make.
    """
    model, updates = subject.model, dict[str, torch.Tensor]()
    for site in subject.graph.layers:
        mixer, groups = model.get_submodule(site.path), site.layout.sizes["group"]
        weight = mixer.out_proj.weight.unflatten(-1, (groups, -1))  # (hidden size, groups, D / groups)
        entering, leaving = Inputs(mixer), Inputs(mixer.out_proj)
        for tokens, _ in data.batches(8):
            with sspruner.masked(model, replace(plan, updates=updates)), entering, leaving:
                model(input_ids=tokens, use_cache=False)
        inputs = [args[0].flatten(0, 1).unflatten(-1, (groups, -1)) for args, _ in leaving.seen]
        written = torch.cat(
            [torch.einsum("tgd,ogd->tgo", u, weight).double() for u in inputs]
        )  # (tokens, groups, hidden)
        wanted = torch.cat([mixer(*args, **kwargs).flatten(0, 1).double() for args, kwargs in entering.seen])
        left = torch.einsum("tgo,tho->gh", written, written)
        factors = torch.linalg.solve(left, torch.einsum("tgo,to->g", written, wanted)).float()
        with sspruner.masked(model, plan):
            norm = mixer.norm.weight.detach().clone()
        updates[f"{site.path}.norm.weight"] = norm * factors.repeat_interleave(len(norm) // groups)
    return replace(plan, updates=updates)


class Inputs:
    """Context manager that notes the arguments of every call of a module."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module, self.seen = module, list[Any]()

    def __enter__(self) -> None:
        self.hook = self.module.register_forward_pre_hook(lambda _, *call: self.seen.append(call), with_kwargs=True)

    def __exit__(self, *_: Any) -> None:
        self.hook.remove()
