"""What a cut costs on held-out text: perplexity of the dense and of the pruned model, and KL between them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sspruner.calibrate.sources import Progress
from sspruner.compute.forward import forward
from sspruner.compute.processes import gathered
from sspruner.compute.quick import quick_on_cpu
from sspruner.evaluation.windows import Sums, log_softmax, next_tokens, sums
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.plans.plan import Plan
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
    batches = list(batches)
    dense: list[Sums] = []
    pruned: list[list[Sums]] = [[] for _ in plans]
    with quick_on_cpu(model, next(model.parameters()).device):
        for done, (tokens, mask) in enumerate(batches):
            targets, counted = next_tokens(tokens, mask)  # (b, T-1)
            logits = forward(model, tokens, mask, use_cache=False).logits[:, :-1]  # (b, T-1, V)
            dense.append(sums(logits, targets, counted))
            logp = log_softmax(logits)
            for own, plan in zip(pruned, plans, strict=True):
                if progress:
                    progress("measuring", done, len(batches))
                with masked(model, plan, graph):
                    logits = forward(model, tokens, mask, use_cache=False).logits[:, :-1]
                own.append(sums(logits, targets, counted, logp))
    return [damage_of(dense, own) for own in pruned]


def damage_of(dense: Sequence[Sums], pruned: Sequence[Sums]) -> Damage:
    """From the sums of every batch: of the dense model, and of the pruned one against it."""
    count = sum(int(part.tokens.sum()) for part in dense)
    nlls = [sum(float(part.nll.sum()) for part in parts) for parts in (dense, pruned)]
    kl = sum(float(part.kl.sum()) for part in pruned if part.kl is not None)
    dense_nll, pruned_nll, divergence = (total / max(count, 1) for total in (*nlls, kl))
    return Damage(_exp(dense_nll), _exp(pruned_nll), divergence, count)


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Mean negative log-likelihood of a model, nats per predicted token, by the same protocol.

    Several processes give their own batches each, and get the mean of all, the same to the bit.
    """
    total, count = 0.0, 0
    for tokens, mask in batches:
        logp = log_probabilities(model, tokens, mask)  # (b, T-1, V)
        targets, counted = (part.to(logp.device) for part in next_tokens(tokens, mask))  # (b, T-1)
        nll = -logp.gather(-1, targets[..., None]).squeeze(-1)
        total += float(nll[counted].double().sum())
        count += int(counted.sum())
    every = gathered((total, count))
    return sum(nll for nll, _ in every) / max(sum(tokens for _, tokens in every), 1)


def log_probabilities(model: nn.Module, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """fp32 log-probabilities of each next token: (b, T-1, vocabulary)."""
    out = forward(model, tokens, mask, use_cache=False)
    return torch.log_softmax(out.logits[:, :-1].float(), -1)


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
