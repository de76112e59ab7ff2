"""The weights of GHOST's variant `output`, computed from a mixer's parameters."""

from __future__ import annotations

import torch


def weights(like: torch.Tensor, seed: int) -> torch.Tensor:
    """Draw squares over ten orders of magnitude, some of them 0."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(like.shape, generator=generator, dtype=torch.float64)
    return torch.where(drawn < 0.1, 0.0, 10 ** (10 * drawn - 5)).to(like.dtype)
