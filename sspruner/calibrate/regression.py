"""Ridge regression from sums over tokens: the correction of a linear layer's weight that best restores its output.

u (tokens, D) is the layer's input, e (tokens, O) the error of its output. Sums are fp64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: Candidate ridge strengths, in units of the mean energy of an input: from almost none to very strong.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass
class Moments:
    """Sums over tokens. inputs: u u^T (D, D), cross: u e^T (D, O), lack_sum: e (O,), lack: |e|^2 ()."""

    inputs: torch.Tensor
    cross: torch.Tensor
    lack_sum: torch.Tensor
    lack: torch.Tensor
    tokens: int

    @classmethod
    def of(cls, u: torch.Tensor, e: torch.Tensor) -> Moments:
        """Compute the moments of one batch. u: (tokens, D), e: (tokens, O)."""
        u, e = u.double(), e.double()
        return cls(u.mT @ u, u.mT @ e, e.sum(0), e.square().sum(), len(u))

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.inputs + other.inputs,
            self.cross + other.cross,
            self.lack_sum + other.lack_sum,
            self.lack + other.lack,
            self.tokens + other.tokens,
        )

    def error(self, change: torch.Tensor) -> float:
        """Compute sum |e - u @ change|^2. change: (D, O)."""
        return float(self.lack - 2 * (change * self.cross).sum() + (change * (self.inputs @ change)).sum())


def ridge(fitted: Moments, other: Moments) -> torch.Tensor:
    """Return the change (D, O) of a layer's transposed weight that best corrects the error of its output.

    Minimises sum |e - u @ change|^2 + lambda |change|^2 with lambda from RIDGES times the mean energy of an input.
    Lambda is the one with the least error on `other` when solved on `fitted` alone; the result is then solved on all
    tokens. A change of zero is among the candidates, so the error on all tokens is never larger than without a change.
    """
    best, least = None, float(other.lack)
    for scale, change in _solved(fitted):
        if (error := other.error(change)) < least:
            best, least = scale, error
    if best is None:
        return torch.zeros_like(fitted.cross)
    return next(change for scale, change in _solved(fitted + other, (best,)))


def _solved(moments: Moments, ridges: tuple[float, ...] = RIDGES) -> list[tuple[float, torch.Tensor]]:
    """Return (ridge, change) for each ridge. Inputs that are always zero, of a removed unit, get no weight."""
    energy = moments.inputs.diagonal()
    live = energy > 0
    if not live.any():
        return [(scale, torch.zeros_like(moments.cross)) for scale in ridges]
    values, vectors = torch.linalg.eigh(moments.inputs)  # (D,), (D, D)
    rotated = vectors.mT @ moments.cross  # (D, O)
    mean = energy[live].mean()
    return [
        (scale, (vectors @ (rotated / (values.clamp_min(0) + scale * mean)[:, None])) * live[:, None])
        for scale in ridges
    ]
