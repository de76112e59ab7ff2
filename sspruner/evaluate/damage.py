"""What a cut costs on held-out text: perplexity of the dense and of the pruned model, and KL between them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sspruner.calibrate.sources import Progress
from sspruner.forward import forward
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.planning.plan import Plan
from sspruner.surgery.mask import masked


@dataclass(frozen=True)
class Damage:
    """Perplexity of both models, mean KL(dense || pruned) in nats per token, and the number of predicted tokens.

    Protocol: each window is scored alone; its first token is context only; padding is neither context nor counted.
    """

    dense_perplexity: float
    pruned_perplexity: float
    kl: float
    tokens: int


def damage(
    model: nn.Module,
    plan: Plan,
    graph: SSMGraph,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
) -> Damage:
    """Compare a dense model with itself under the mask of `plan`, batch by batch; the model is left as it was.

    A mask equals its slice (surgery.proof asserts it), so one copy of the model serves for both.
    batches: (tokens int64 (b, T), mask bool (b, T)).
    """
    return damages(model, [plan], graph, batches)[0]


@torch.no_grad()
def damages(
    model: nn.Module,
    plans: Sequence[Plan],
    graph: SSMGraph,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    progress: Progress | None = None,
) -> list[Damage]:
    """The same for several plans; the dense model runs once on each batch."""
    totals = torch.zeros(len(plans), 3, dtype=torch.float64)  # dense nll, pruned nll, kl
    count, batches = 0, list(batches)
    for done, (tokens, mask) in enumerate(batches):
        dense = log_probabilities(model, tokens, mask)  # (b, T-1, V)
        counted = (mask[:, 1:] & mask[:, :-1]).to(dense.device)  # (b, T-1)
        target = tokens[:, 1:, None].to(dense.device)
        count += int(counted.sum())
        for total, plan in zip(totals, plans, strict=True):
            if progress:
                progress("measuring", done, len(batches))
            with masked(model, plan, graph):
                pruned = log_probabilities(model, tokens, mask)
            rows = (
                -dense.gather(-1, target).squeeze(-1),
                -pruned.gather(-1, target).squeeze(-1),
                (dense.exp() * (dense - pruned)).sum(-1),
            )
            total += torch.stack([row[counted].double().sum() for row in rows]).cpu()
    means = (totals / max(count, 1)).tolist()
    return [Damage(_exp(dense_nll), _exp(pruned_nll), kl, count) for dense_nll, pruned_nll, kl in means]


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Mean negative log-likelihood of a model, nats per predicted token, by the same protocol."""
    total, count = 0.0, 0
    for tokens, mask in batches:
        logp = log_probabilities(model, tokens, mask)  # (b, T-1, V)
        counted = (mask[:, 1:] & mask[:, :-1]).to(logp.device)  # (b, T-1)
        nll = -logp.gather(-1, tokens[:, 1:, None].to(logp.device)).squeeze(-1)
        total += float(nll[counted].double().sum())
        count += int(counted.sum())
    return total / max(count, 1)


def log_probabilities(model: nn.Module, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """fp32 log-probabilities of each next token: (b, T-1, vocabulary)."""
    out = forward(model, tokens, mask, use_cache=False)
    return torch.log_softmax(out.logits[:, :-1].float(), -1)


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
