"""Exact statistics of any scan: each function calls the one of the module that belongs to its kind of decay."""

from __future__ import annotations

from types import ModuleType

import torch

from sspruner.calibrate import delta_channels, selective, state
from sspruner.graph.family import DeltaProjected, Scan, SelectiveProjected


def scan_output(p: Scan) -> torch.Tensor:
    """Compute the scan's output y before gate and norm: (b, T, H, P)."""
    y: torch.Tensor = _statistics(p).scan_output(p)
    return y


def ghost_sum(p: Scan, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Sum the squared change of y where a state is not read, over samples, tokens, heads and channels: (G, N)."""
    total: torch.Tensor = _statistics(p).ghost_sum(p, mask)
    return total


def weighted_ghost_sum(p: Scan, w: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Sum the same with weights w, (b, T, H, P), for every channel of y: (G, N)."""
    total: torch.Tensor = _statistics(p).weighted_ghost_sum(p, w, mask)
    return total


def energy_sum(p: Scan, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Sum the squared states over samples, tokens, heads of a group and channels: (G, N)."""
    total: torch.Tensor = _statistics(p).energy_sum(p, mask)
    return total


def _statistics(p: Scan) -> ModuleType:
    if isinstance(p, SelectiveProjected):
        return selective
    if isinstance(p, DeltaProjected) and p.decay.ndim == 4:  # by key channel
        return delta_channels
    return state
