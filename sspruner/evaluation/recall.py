"""Multi-query associative recall (MQAR), generated on the spot: does a model find what it read before?

A sequence holds different keys, each followed by its value, and then the keys again in a random order, each followed
by its value once more. Keys are random tokens of the vocabulary's first half, values of its second half. Asked is the
value after each key's second occurrence. Task: Arora et al., "Zoology", arXiv 2312.04927, without filler.
"""

from __future__ import annotations

from typing import Any

import torch

from sspruner.compute.forward import embedding, forward
from sspruner.errors import InputError

BATCH = 64
PAIRS = 16  # where a model says nothing else


def sequences(count: int, pairs: int, vocabulary: int, generator: torch.Generator) -> torch.Tensor:
    """Random recall tasks: int64 (count, 4 pairs), with keys below vocabulary / 2 and values from there on.

    Raises InputError if the vocabulary holds fewer keys than pairs.
    """
    half = vocabulary // 2
    if not 1 <= pairs <= half:
        raise InputError(f"recall: {pairs} pairs need {pairs} different keys; half the vocabulary holds {half}")
    keys = torch.rand(count, half, generator=generator).argsort(1)[:, :pairs]  # (count, pairs), all different
    values = torch.randint(half, vocabulary, (count, pairs), generator=generator)
    order = torch.rand(count, pairs, generator=generator).argsort(1)
    queries, answers = keys.gather(1, order), values.gather(1, order)
    return torch.cat([torch.stack([keys, values], 2).flatten(1), torch.stack([queries, answers], 2).flatten(1)], 1)


def tasks_for(model: Any, count: int, seed: int) -> torch.Tensor:
    """Recall tasks in a model's vocabulary: int64 (count, 4 pairs).

    As many pairs as its training had (`recall_pairs` in its config, from benchmarks/studies/train_recall.py), else
    PAIRS, or fewer in a small vocabulary.
    """
    vocabulary = embedding(model).num_embeddings
    pairs = min(int(getattr(getattr(model, "config", None), "recall_pairs", PAIRS)), vocabulary // 2)
    return sequences(count, max(1, pairs), vocabulary, torch.Generator().manual_seed(seed))


def answers(logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits after each query (b, pairs, V), and the value that should follow, int64 (b, pairs).

    logits (b, 4 pairs, V) are a model's for tokens (b, 4 pairs).
    """
    first = tokens.shape[1] // 2
    return logits[:, first::2], tokens[:, first + 1 :: 2].to(logits.device)


@torch.no_grad()
def recall(model: Any, tokens: torch.Tensor, batch_size: int = BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    """The fraction of each sequence's queries that get the right value, and the mean nll of these values in nats:
    fp64 (sequences,), both."""
    rows = []
    for start in range(0, len(tokens), batch_size):
        batch = tokens[start : start + batch_size]
        logits, target = answers(forward(model, batch, use_cache=False).logits, batch)
        nll = -logits.float().log_softmax(-1).gather(-1, target[..., None]).squeeze(-1)  # (b, pairs)
        rows.append(torch.stack([(logits.argmax(-1) == target).double().mean(1), nll.double().mean(1)]).cpu())
    accuracy, nll = torch.cat(rows, 1)
    return accuracy, nll
