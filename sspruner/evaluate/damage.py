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
from sspruner.quick import quick_on_cpu
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
    totals = [Total() for _ in plans]
    batches = list(batches)
    with quick_on_cpu(model, next(model.parameters()).device):
        for done, (tokens, mask) in enumerate(batches):
            dense = log_softmax(forward(model, tokens, mask, use_cache=False).logits)
            for total, plan in zip(totals, plans, strict=True):
                if progress:
                    progress("measuring", done, len(batches))
                with masked(model, plan, graph):
                    pruned = forward(model, tokens, mask, use_cache=False).logits
                total.add(tokens, mask, dense, pruned)
    return [total.damage() for total in totals]


def log_softmax(logits: torch.Tensor) -> list[torch.Tensor]:
    """fp32 log-probabilities of the next tokens, sequence by sequence: (b, T, V) -> b times (T-1, V)."""
    return [torch.log_softmax(row[:-1].float(), -1) for row in logits]


class Total:
    """The sums over predicted tokens that make a Damage."""

    def __init__(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64)  # dense nll, pruned nll, kl
        self.count = 0

    def add(self, tokens: torch.Tensor, mask: torch.Tensor, dense: list[torch.Tensor], pruned: torch.Tensor) -> None:
        """Add a batch: tokens int64 and mask bool, (b, T), `log_softmax` of the dense model's logits, and the pruned
        model's logits, (b, T, V).

        Sequence by sequence, for in fp32 the logits of a batch are wide.
        """
        counted = (mask[:, 1:] & mask[:, :-1]).to(pruned.device)  # (b, T-1)
        rows = []
        for ids, p, theirs in zip(tokens.to(pruned.device), dense, pruned, strict=True):
            q = torch.log_softmax(theirs[:-1].float(), -1)  # (T-1, V), as p
            target = ids[1:, None]
            nll = (-logp.gather(-1, target).squeeze(-1) for logp in (p, q))
            rows.append(torch.stack([*nll, (p.exp() * (p - q)).sum(-1)]))  # (3, T-1)
        self.sums += torch.stack([row[counted].double().sum() for row in torch.stack(rows, 1)]).cpu()
        self.count += int(counted.sum())

    def damage(self) -> Damage:
        """Perplexities and mean divergence over all that was added."""
        dense_nll, pruned_nll, kl = (self.sums / max(self.count, 1)).tolist()
        return Damage(_exp(dense_nll), _exp(pruned_nll), kl, self.count)


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
