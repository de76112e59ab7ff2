"""Do scorers agree? Of the units that one keeps at a cut, the share that another would remove."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import torch

from sspruner.scoring.scores import Scores


def displaced(a: torch.Tensor, b: torch.Tensor, sparsity: float) -> tuple[int, int]:
    """(units that `a` keeps and `b` removes, units kept), both at the same cut of every set.

    a, b: importance (groups, units) of the same dependency group. Of equal scores the first unit stays.
    """
    count = max(1, round(a.shape[1] * (1 - sparsity)))
    mine, theirs = (torch.sort(scores, descending=True, stable=True).indices[:, :count] for scores in (a, b))
    both = (mine[:, :, None] == theirs[:, None, :]).any(-1).sum()
    return mine.numel() - int(both), mine.numel()


def agreement(scores: Mapping[str, Scores], sparsities: tuple[float, ...]) -> dict[tuple[str, str], list[float]]:
    """Pair of scorers -> the share of displaced units at each cut, over all dependency groups that both have scored.

    Scores of different models are not compared, nor those of directions with those of coordinates.
    """
    shares = {}
    for one, other in combinations(scores, 2):
        a, b = scores[one], scores[other]
        names = [n for n, t in a.importance.items() if n in b.importance and b.importance[n].shape == t.shape]
        names = [n for n in names if n not in a.bases and n not in b.bases]
        if names and a.metadata.get("model") == b.metadata.get("model"):
            found = [[displaced(a.importance[n], b.importance[n], s) for n in names] for s in sparsities]
            shares[one, other] = [sum(gone for gone, _ in at) / sum(kept for _, kept in at) for at in found]
    return shares


def is_static(scores: Scores) -> bool:
    """Whether the scores come from the weights alone: no text was calibrated on."""
    return not scores.metadata.get("calibration")


def telling(pairs: dict[tuple[str, str], list[float]], scores: Mapping[str, Scores]) -> list[tuple[str, str]]:
    """The pairs of a rank by weights alone and one by what the model does at run time; all, if there are none such."""
    mixed = [pair for pair in pairs if is_static(scores[pair[0]]) != is_static(scores[pair[1]])]
    return mixed or list(pairs)
