"""Agreement of scorers: of the units that one keeps at a cut, the share that another would remove."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import torch

from sspruner.scoring.scores import Scores


def displaced(a: torch.Tensor, b: torch.Tensor, sparsity: float) -> tuple[int, int]:
    """Return (units that `a` keeps and `b` removes, units kept), both at the same cut of every set.

    a, b: importance (groups, units) of the same dependency group. Of equal scores the first unit is kept.
    """
    count = max(1, round(a.shape[1] * (1 - sparsity)))
    kept_by_a, kept_by_b = (torch.sort(scores, descending=True, stable=True).indices[:, :count] for scores in (a, b))
    both = (kept_by_a[:, :, None] == kept_by_b[:, None, :]).any(-1).sum()
    return kept_by_a.numel() - int(both), kept_by_a.numel()


def agreement(scores: Mapping[str, Scores], sparsities: tuple[float, ...]) -> dict[tuple[str, str], list[float]]:
    """Return the share of displaced units at each cut, by pair of scorers, over all groups that both have scored.

    Scores of different models, and scores of directions, are not compared.
    """
    shares = {}
    for one, other in combinations(scores, 2):
        a, b = scores[one], scores[other]
        names = [n for n, t in a.importance.items() if n in b.importance and b.importance[n].shape == t.shape]
        names = [n for n in names if n not in a.bases and n not in b.bases]
        if names and a.metadata.get("model") == b.metadata.get("model"):
            counts = [[displaced(a.importance[n], b.importance[n], s) for n in names] for s in sparsities]
            shares[one, other] = [
                sum(displaced_units for displaced_units, _ in at) / sum(kept for _, kept in at) for at in counts
            ]
    return shares


def is_static(scores: Scores) -> bool:
    """Check whether the scores come from the weights alone, without calibration text."""
    return not scores.metadata.get("calibration")


def telling(pairs: dict[tuple[str, str], list[float]], scores: Mapping[str, Scores]) -> list[tuple[str, str]]:
    """Return the pairs of one scorer by weights alone and one by calibration text; all pairs if there are none."""
    mixed = [pair for pair in pairs if is_static(scores[pair[0]]) != is_static(scores[pair[1]])]
    return mixed or list(pairs)
