"""Damage of a cut on held-out text: perplexity of the dense and of the pruned model, and KL between them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sspruner.calibrate.sources import Progress
from sspruner.compute.finite import refuse_not_finite
from sspruner.compute.forward import forward
from sspruner.compute.processes import gathered
from sspruner.compute.quick import quick_on_cpu
from sspruner.evaluation.paired import Interval, perplexity_ratio
from sspruner.evaluation.windows import Logits, Sums, Windows, alone, logits_of, losses_by_batch, watched
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.plans.plan import Plan
from sspruner.surgery.mask import masked


@dataclass(frozen=True)
class Damage:
    """Perplexity of both models, mean KL(dense || pruned) in nats per token, and the number of predicted tokens.

    ratio: pruned over dense perplexity, with its 95 % interval over windows, of each of which both models are measured.

    Protocol: each window is scored separately; its first token is context only; padding is neither context nor counted.
    """

    dense_perplexity: float
    pruned_perplexity: float
    kl: float
    tokens: int
    ratio: Interval


def damage(
    model: nn.Module,
    plan: Plan,
    graph: SSMGraph,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
) -> Damage:
    """Compare a dense model with itself under the mask of `plan`, batch by batch. The model is not changed.

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
    """Return the damage of several plans; the dense model runs once on each batch.

    Raises ModelError if the dense model's outputs are not finite.
    """
    windows = [alone(tokens, mask) for tokens, mask in batches]
    run = logits_of(model)

    def cut(plan: Plan) -> Logits:
        def logits(batch: Windows) -> torch.Tensor:
            with masked(model, plan, graph):
                return run(batch)

        return logits

    with quick_on_cpu(model, next(model.parameters()).device):
        found = damages_of(watched(windows, progress, "measuring", len(windows)), run, [cut(plan) for plan in plans])
        if not all(math.isfinite(each.dense_perplexity) for each in found):
            refuse_not_finite(model, lambda: [run(batch) for batch in windows])
    return found


def damages_of(batches: Iterable[Windows], dense: Logits, pruned: Sequence[Logits]) -> list[Damage]:
    """Return the damage of each pruned version of a dense model, all given as functions from a batch to logits."""
    losses = list(losses_by_batch(batches, pruned, dense))
    dense_sums = [part for part, _ in losses if part is not None]
    return [_damage(dense_sums, [versions[i] for _, versions in losses]) for i in range(len(pruned))]


def _damage(dense: Sequence[Sums], pruned: Sequence[Sums]) -> Damage:
    """Return the damage from the sums of every batch, of the dense model and of the pruned one against it."""
    count = sum(int(part.tokens.sum()) for part in dense)
    nlls = [sum(float(part.nll.sum()) for part in parts) for parts in (dense, pruned)]
    kl = sum(float(part.kl.sum()) for part in pruned if part.kl is not None)
    dense_nll, pruned_nll, divergence = (total / max(count, 1) for total in (*nlls, kl))
    ours, theirs = (torch.cat([part.nll for part in one]) for one in (pruned, dense))
    ratio = perplexity_ratio(ours, theirs, torch.cat([part.tokens for part in dense]))
    return Damage(_exp(dense_nll), _exp(pruned_nll), divergence, count, ratio)


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Return the mean negative log-likelihood of a model, nats per predicted token, by the same protocol.

    With several processes, each passes its own batches, and all get the same mean over all batches, bit for bit.
    """
    total, count = 0.0, 0
    windows = [alone(tokens, mask) for tokens, mask in batches]
    for batch, (_, (batch_sums,)) in zip(windows, losses_by_batch(windows, [logits_of(model)]), strict=True):
        assert batch_sums.each is not None
        total += float(batch_sums.each[batch.counted.cpu()].sum())
        count += int(batch.counted.sum())
    every = gathered((total, count))
    return sum(nll for nll, _ in every) / max(sum(tokens for _, tokens in every), 1)


def log_probabilities(model: nn.Module, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return fp32 log-probabilities of each next token: (b, T-1, vocabulary)."""
    out = forward(model, tokens, mask, use_cache=False)
    return torch.log_softmax(out.logits[:, :-1].float(), -1)


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
