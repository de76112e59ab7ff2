"""Least squares from moments: what a linear layer should add to its output, from sums over tokens alone.

u (tokens, D) is what the layer is given, e (tokens, O) what its output lacks. Sums are fp64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: Ridges that are tried, in units of the mean energy of an input: from next to none to one that hardly lets go.
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
        """The moments of one batch. u: (tokens, D), e: (tokens, O)."""
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
        """sum |e - u @ change|^2. change: (D, O)."""
        return float(self.lack - 2 * (change * self.cross).sum() + (change * (self.inputs @ change)).sum())


def ridge(fitted: Moments, other: Moments) -> torch.Tensor:
    """The change (D, O) of a layer's transposed weight that makes up for what its output lacks.

    min sum |e - u @ change|^2 + lambda |change|^2, lambda from RIDGES times the mean energy of an input: the one that
    leaves `other` the least error when `fitted` alone is solved; then all tokens are. No change at all is among the
    candidates. Whatever lambda is, the error on all tokens is at most that of no change, since that is feasible.
    """
    best, least = None, float(other.lack)
    for scale, change in _solved(fitted):
        if (error := other.error(change)) < least:
            best, least = scale, error
    if best is None:
        return torch.zeros_like(fitted.cross)
    return next(change for scale, change in _solved(fitted + other, (best,)))


def _solved(moments: Moments, ridges: tuple[float, ...] = RIDGES) -> list[tuple[float, torch.Tensor]]:
    """(ridge, change) for each ridge. An input that is always zero, of a unit that is gone, gets no weight."""
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
