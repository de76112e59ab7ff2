"""Make scores comparable between layers, so that one threshold can be applied to all of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sspruner.axes import axis_of


def comparable(importance: Mapping[str, torch.Tensor], how: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Return the scores of all layers on one scale: name -> (groups, units). how: axis -> one of budget.NORMALISATIONS.

    "energy"  divides by the root of the layer's sum of squared scores. The squared scores of GHOST and of balanced are
              mean squared errors of y, and their sum, without cross terms, is the energy that the layer's states add to
              y: the result is the error relative to the energy of the layer's own output
    "last"    s² over the sum of s² of all units of the layer that are at least as strong (Gwak et al., LAST, arXiv
              2411.02824, with s² in place of its squared gain)
    "none"    leaves scores unchanged: for scores that measure the model's loss, or that are shares already
    """
    axes = {name: axis_of(name) for name in importance}
    scale = {"none": _as_it_is, "energy": _of_energy, "last": _last}
    return {name: scale[how.get(axes[name], "none")](scores) for name, scores in importance.items()}


def _as_it_is(scores: torch.Tensor) -> torch.Tensor:
    return scores


def _of_energy(scores: torch.Tensor) -> torch.Tensor:
    total = scores.double().square().sum().sqrt()
    return scores.double() / total if total > 0 else scores.double()


def _last(scores: torch.Tensor) -> torch.Tensor:
    """Compute LAST's share of the reverse cumulative sum. Equal scores count together."""
    energy, order = scores.double().square().flatten().sort(descending=True)
    total = energy.cumsum(0)
    ends = torch.searchsorted(-energy, -energy, right=True) - 1  # index of the last equal score
    share = torch.where(total[ends] > 0, energy / total[ends], 0.0)
    return torch.zeros_like(share).scatter_(0, order, share).view(scores.shape)
