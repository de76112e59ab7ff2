"""Change a plan in ways that were tried and are not offered: experiments name them in a cell."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
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
        entering, leaving = list[Any](), list[Any]()
        hooks = [mixer.register_forward_pre_hook(partial(note, entering), with_kwargs=True)]
        hooks.append(mixer.out_proj.register_forward_pre_hook(partial(note, leaving), with_kwargs=True))
        for tokens, _ in data.batches(8):
            with sspruner.masked(model, replace(plan, updates=updates)):
                model(input_ids=tokens, use_cache=False)
        for hook in hooks:
            hook.remove()
        inputs = [args[0].flatten(0, 1).unflatten(-1, (groups, -1)) for args, _ in leaving]
        written = torch.cat([torch.einsum("tgd,ogd->tgo", u, weight).double() for u in inputs])  # (tokens, groups, H)
        wanted = torch.cat([mixer(*args, **kwargs).flatten(0, 1).double() for args, kwargs in entering])
        left = torch.einsum("tgo,tho->gh", written, written)
        factors = torch.linalg.solve(left, torch.einsum("tgo,to->g", written, wanted)).float()
        with sspruner.masked(model, plan):
            norm = mixer.norm.weight.detach().clone()
        updates[f"{site.path}.norm.weight"] = norm * factors.repeat_interleave(len(norm) // groups)
    return replace(plan, updates=updates)


def note(seen: list[Any], _: torch.nn.Module, *call: Any) -> None:
    """Add the arguments of a call."""
    seen.append(call)
