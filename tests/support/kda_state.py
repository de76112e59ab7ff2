"""Scan inputs of one KDA mixer, and its step-by-step recurrence in fp64."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from sspruner.graph.family import DeltaProjected

NAMES = ("q", "k", "v", "z", "beta", "decay")


def states(p: DeltaProjected) -> torch.Tensor:
    """Return S_t = a_t S_{t-1} + k_t beta_t (v_t - (a_t S_{t-1})^T k_t)^T, step by step: fp64 (b, T, H, K, V)."""
    k, v, beta, decay = (getattr(p, name).double() for name in ("k", "v", "beta", "decay"))
    b, T, H, K = k.shape
    S = torch.zeros(b, H, K, v.shape[-1], dtype=torch.float64)
    steps = []
    for t in range(T):
        S = decay[:, t].exp()[..., None] * S
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t])
        S = S + torch.einsum("bhk,bhv,bh->bhkv", k[:, t], error, beta[:, t])
        steps.append(S)
    return torch.stack(steps, 1)


def output(p: DeltaProjected) -> torch.Tensor:
    """Return y_t = S_t^T q_t: fp64 (b, T, H, V)."""
    return torch.einsum("bthkv,bthk->bthv", states(p), p.q.double())


def energy(p: DeltaProjected, mask: torch.Tensor) -> torch.Tensor:
    """Return the sum of S^2 over tokens and value channels: fp64 (H, K)."""
    return (states(p).square().sum(-1) * mask[..., None, None]).sum((0, 1))


def ghost(p: DeltaProjected, mask: torch.Tensor) -> torch.Tensor:
    """Return the sum of S^2 q^2 over tokens and value channels: fp64 (H, K)."""
    return (states(p).square().sum(-1) * p.q.double().square() * mask[..., None, None]).sum((0, 1))


def weighted_ghost(p: DeltaProjected, w: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the sum of w S^2 q^2 over tokens and value channels: fp64 (H, K). w: (b, T, H, V)."""
    weighted = (states(p).square() * w.double()[..., None, :]).sum(-1)  # (b, T, H, K)
    return (weighted * p.q.double().square() * mask[..., None, None]).sum((0, 1))


def rows(p: DeltaProjected, at: slice, steps: slice = slice(None)) -> DeltaProjected:
    """Return some samples of a batch, at some steps of the sequence."""
    return replace(p, **{name: getattr(p, name)[at, steps] for name in NAMES})


@st.composite
def projections(draw: st.DrawFn, dtype: torch.dtype = torch.float32) -> tuple[DeltaProjected, torch.Tensor]:
    """Draw inputs of any shape, decays from exp(-1e-6) to exp(-30) in one sequence, beta up to 2, and padding."""
    b, T, H = draw(st.integers(1, 3)), draw(st.integers(1, 70)), draw(st.integers(1, 3))
    K, V = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    slowest, fastest = sorted(draw(st.tuples(*[st.sampled_from([-6.0, -2.0, 0.0, 1.5])] * 2)))
    most = draw(st.sampled_from([1.0, 2.0]))
    p = DeltaProjected(
        q=F.normalize(normal(b, T, H, K), dim=-1) * K**-0.5,
        k=F.normalize(normal(b, T, H, K), dim=-1),
        v=normal(b, T, H, V),
        z=normal(b, T, H * V),
        beta=most * torch.rand(b, T, H, generator=generator, dtype=dtype),
        decay=-(10 ** (slowest + (fastest - slowest) * torch.rand(b, T, H, K, generator=generator, dtype=dtype))),
    )
    return p, torch.rand(b, T, generator=generator) < draw(st.sampled_from([0.3, 0.9, 1.0]))
