"""The measures of a comparison: several versions of a model on the same text, passages and recall sequences.

Each version is compared with the dense model item by item, so the intervals of ratios and divergences are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import nn

from sspruner.calibrate.sources import Progress
from sspruner.errors import InputError
from sspruner.evaluation.last_word import Passage, last_words
from sspruner.evaluation.paired import Interval, difference, mean, perplexity, perplexity_ratio, rate, share
from sspruner.evaluation.recall import recall, tasks_for
from sspruner.evaluation.windows import Logits, Sums, Windows, alone, joined, logits_of, losses_by_batch, watched

METRICS = ("ppl", "kl", "lambada", "recall")
RECALL_SEQUENCES = 128

Version = Callable[[], AbstractContextManager[nn.Module]]  # a model, as it is inside the block


@dataclass(frozen=True)
class Asked:
    """What is asked of every version: (tokens int64, mask bool) batches, (b, T); passages; int64 (sequences, T)."""

    batches: Sequence[tuple[torch.Tensor, torch.Tensor]]
    passages: Sequence[Passage]
    recall: torch.Tensor | None
    seed: int = 0


@dataclass(frozen=True)
class Values:
    """What one version gave: sums of each window, None without text; name -> a number for each passage or sequence."""

    text: Sums | None
    items: dict[str, torch.Tensor] = field(default_factory=dict)


def check_metrics(metrics: Sequence[str], passages: bool) -> None:
    """Raise InputError for a metric that does not exist, and for LAMBADA without passages."""
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise InputError(f"metrics {', '.join(unknown) or 'none'}: choose among {', '.join(METRICS)}")
    if ("lambada" in metrics) != passages:
        raise InputError("metric lambada and its passages go together: name a file with --lambada")


def questions(
    model: nn.Module,
    batches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    metrics: Sequence[str],
    passages: Sequence[Passage],
    seed: int,
) -> Asked:
    """What metrics ask of a model and its versions. batches: of the text; recall sequences are made with the seed."""
    made = None
    if "recall" in metrics:
        made = tasks_for(model, RECALL_SEQUENCES, seed)
    return Asked(batches if {"ppl", "kl"} & set(metrics) else (), passages, made, seed)


@torch.no_grad()
def measure(
    dense: nn.Module, versions: Sequence[Version], asked: Asked, progress: Progress | None = None
) -> list[Values]:
    """Every version's values, in order; the dense model runs once on each batch of text."""
    steps = len(asked.batches) + len(versions) * bool(asked.passages or asked.recall is not None)
    batches = watched((alone(*batch) for batch in asked.batches), progress, "measuring", steps)
    said = [_logits(version) for version in versions]
    text = [own for _, own in losses_by_batch(batches, said, logits_of(dense), of_dense=False)]
    values = []
    for i, version in enumerate(versions):
        if progress:
            progress("measuring", len(asked.batches) + i, steps)
        with version() as model:
            values.append(Values(joined([own[i] for own in text]) if text else None, _items(model, asked)))
    return values


def _logits(version: Version) -> Logits:
    def logits(batch: Windows) -> torch.Tensor:
        with version() as model:
            return logits_of(model)(batch)

    return logits


def _items(model: nn.Module, asked: Asked) -> dict[str, torch.Tensor]:
    items = {}
    if asked.passages:
        items["lambada_nll"], items["lambada_accuracy"] = last_words(model, asked.passages)
    if asked.recall is not None:
        items["recall_accuracy"], items["recall_nll"] = recall(model, asked.recall)
    return items


def summary(values: Values, dense: Values, seed: int = 0) -> dict[str, Interval]:
    """Measures with their 95 % intervals, in the order of docs/cli.md; of differences and ratios on the same items."""
    found = {}
    if values.text and dense.text and values.text.kl is not None and values.text.agreement is not None:
        own, tokens = values.text, values.text.tokens
        found["perplexity"] = perplexity(own.nll, tokens, seed)
        found["perplexity_ratio"] = perplexity_ratio(own.nll, dense.text.nll, tokens, seed)
        found["kl_to_dense"] = rate(values.text.kl, tokens, seed)
        found["top1_agreement"] = rate(values.text.agreement, tokens, seed)
    for name, items in values.items.items():
        found[name] = share(items) if items.dtype == torch.bool else mean(items, seed)
        found[f"{name}_change"] = difference(items.double(), dense.items[name].double(), seed)
    return found
