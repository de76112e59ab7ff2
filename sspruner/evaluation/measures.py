"""Measures of a comparison: several versions of a model on the same text, passages and recall sequences.

Each version is compared with the dense model item by item, so the intervals of ratios and divergences are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import nn

from sspruner.calibrate.sources import Progress
from sspruner.evaluation.last_word import Passage, last_words
from sspruner.evaluation.paired import Interval, difference, mean, perplexity, perplexity_ratio, rate, share
from sspruner.evaluation.recall import recall, tasks_for
from sspruner.evaluation.windows import Logits, Sums, Windows, alone, joined, logits_of, losses_by_batch, watched

RECALL_SEQUENCES = 128

Version = Callable[[], AbstractContextManager[nn.Module]]  # yields the model in this version


@dataclass(frozen=True)
class Inputs:
    """The inputs of every version: (tokens int64, mask bool) batches, (b, T); passages; int64 (sequences, T)."""

    batches: Sequence[tuple[torch.Tensor, torch.Tensor]]
    passages: Sequence[Passage]
    recall: torch.Tensor | None
    seed: int = 0


@dataclass(frozen=True)
class Values:
    """Results of one version: sums of each window (None without text), and name -> a value per passage or sequence."""

    text: Sums | None
    items: dict[str, torch.Tensor] = field(default_factory=dict)


def inputs_for(
    model: nn.Module,
    batches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    metrics: Sequence[str],
    passages: Sequence[Passage],
    seed: int,
) -> Inputs:
    """Return the inputs that some metrics need. batches: of the text; recall sequences are drawn with the seed."""
    sequences = None
    if "recall" in metrics:
        sequences = tasks_for(model, RECALL_SEQUENCES, seed)
    return Inputs(batches if {"ppl", "kl"} & set(metrics) else (), passages, sequences, seed)


@torch.no_grad()
def measure(
    dense: nn.Module, versions: Sequence[Version], inputs: Inputs, progress: Progress | None = None
) -> list[Values]:
    """Measure every version, in order; the dense model runs once on each batch of text."""
    steps = len(inputs.batches) + len(versions) * bool(inputs.passages or inputs.recall is not None)
    batches = watched((alone(*batch) for batch in inputs.batches), progress, "measuring", steps)
    logits = [_logits(version) for version in versions]
    text = [version_sums for _, version_sums in losses_by_batch(batches, logits, logits_of(dense), of_dense=False)]
    values = []
    for i, version in enumerate(versions):
        if progress:
            progress("measuring", len(inputs.batches) + i, steps)
        with version() as model:
            values.append(Values(joined([batch[i] for batch in text]) if text else None, _items(model, inputs)))
    return values


def _logits(version: Version) -> Logits:
    def logits(batch: Windows) -> torch.Tensor:
        with version() as model:
            return logits_of(model)(batch)

    return logits


def _items(model: nn.Module, inputs: Inputs) -> dict[str, torch.Tensor]:
    items = {}
    if inputs.passages:
        items["lambada_nll"], items["lambada_accuracy"] = last_words(model, inputs.passages)
    if inputs.recall is not None:
        items["recall_accuracy"], items["recall_nll"] = recall(model, inputs.recall)
    return items


def summary(values: Values, dense: Values, seed: int = 0) -> dict[str, Interval]:
    """Return measures with their 95 % intervals, in the order of docs/cli.md; differences and ratios are paired."""
    measures = {}
    if values.text and dense.text and values.text.kl is not None and values.text.agreement is not None:
        cut, tokens = values.text, values.text.tokens
        measures["perplexity"] = perplexity(cut.nll, tokens, seed)
        measures["perplexity_ratio"] = perplexity_ratio(cut.nll, dense.text.nll, tokens, seed)
        measures["kl_to_dense"] = rate(values.text.kl, tokens, seed)
        measures["top1_agreement"] = rate(values.text.agreement, tokens, seed)
    for name, items in values.items.items():
        measures[name] = share(items) if items.dtype == torch.bool else mean(items, seed)
        measures[f"{name}_change"] = difference(items.double(), dense.items[name].double(), seed)
    return measures
