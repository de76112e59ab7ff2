"""Statistics of mixtures of experts: which tokens a router sends where, and what the experts make of them.

Exact, from one more forward of the chosen experts, in fp32: per expert j, over the tokens X_j that it gets,

    c_j = |X_j|        sum g_j        sum ||f_j||        sum g_j ||f_j||

g is the weight that multiplies the expert's output in the model, after any renormalisation and scaling: what the module
`experts` is called with. f is the expert's output before that weight; where experts work in a latent space, there. All
are sums over tokens. Source of the scores made of them: REAP, arXiv 2510.13999, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Routed:
    """What a router sends to the experts, padding left out: n tokens, k experts for each.

    hidden (n, D), experts int64 (n, k), weights (n, k): the weight g of each chosen expert's output.
    """

    hidden: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class ExpertSums:
    """Sums over the tokens of each expert: fp64.

    tokens          (E,) number of tokens c
    weights         (E,) sum of g
    norms           (E,) sum of ||f||
    weighted_norms  (E,) sum of g ||f||
    energy          tensor of the experts -> (E, in): sum of the squares of what its rows read
    """

    tokens: torch.Tensor
    weights: torch.Tensor
    norms: torch.Tensor
    weighted_norms: torch.Tensor
    energy: dict[str, torch.Tensor]


class _Captured(Exception):
    """Raised by a hook that has seen what it is there for."""


@torch.no_grad()
def routed(moe: nn.Module, hidden: torch.Tensor, mask: torch.Tensor) -> Routed:
    """Run a mixture of experts up to its experts, which are not run. hidden: (b, T, H); mask: bool (b, T)."""
    seen: list[torch.Tensor] = []

    def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = ("hidden_states", "top_k_index", "top_k_weights")
        seen.extend([*args, *(kwargs[name] for name in names[len(args) :])])
        raise _Captured

    handle = moe.experts.register_forward_pre_hook(capture, with_kwargs=True)  # type: ignore[union-attr]
    try:
        with suppress(_Captured):
            moe(hidden)
    finally:
        handle.remove()
    given, experts, weights = (part.reshape(mask.numel(), -1)[mask.flatten()] for part in seen)
    return Routed(given, experts, weights)


@torch.no_grad()
def expert_sums(experts: Any, given: Routed) -> ExpertSums:
    """Compute the sums of one batch. experts: the module with the stacked weights, (E, out, in)."""
    up, down = up_weights(experts), experts.down_proj
    E, _, D = up.shape
    tokens, weights, norms, weighted_norms = down.new_zeros(4, E, dtype=torch.float64)
    energy = {up_name(experts): tokens.new_zeros(E, D), "down_proj": tokens.new_zeros(E, down.shape[2])}
    for e, x, inner, g in by_expert(experts, given):
        norm = F.linear(inner, down[e].float()).double().norm(dim=-1)  # (c,)
        tokens[e], weights[e], norms[e], weighted_norms[e] = len(x), g.sum(), norm.sum(), (g * norm).sum()
        energy[up_name(experts)][e] = x.double().square().sum(0)
        energy["down_proj"][e] = inner.double().square().sum(0)
    return ExpertSums(tokens, weights, norms, weighted_norms, energy)


def by_expert(experts: Any, given: Routed) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield for each expert that has tokens: its index, their inputs (c, D) and neurons (c, I), fp32, and g, fp64."""
    up = up_weights(experts)
    gated = up_name(experts) == "gate_up_proj"
    for e in sorted(set(given.experts.flatten().tolist())):
        token, slot = (given.experts == e).nonzero(as_tuple=True)
        x = given.hidden[token].float()
        rows = F.linear(x, up[e].float())  # (c, 2I) or (c, I)
        yield e, x, experts._apply_gate(rows) if gated else experts.act_fn(rows), given.weights[token, slot].double()


def up_name(experts: Any) -> str:
    """Return the name of the stacked weights that read the experts' input."""
    return "gate_up_proj" if hasattr(experts, "gate_up_proj") else "up_proj"


def up_weights(experts: Any) -> torch.Tensor:
    """Return the stacked weights that read the experts' input: (E, 2I or I, D)."""
    weights: torch.Tensor = getattr(experts, up_name(experts))
    return weights
