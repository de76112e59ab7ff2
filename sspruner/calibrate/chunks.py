"""Chunks of a scan with one decay per head: Q steps at a time, with the state that enters them.

In a chunk every state is a sum over the steps s <= t and the entering state S0. With cum_t = sum of log decays from the
chunk's first step to t, and L[t,s] = exp(cum_t - cum_s) for s <= t,

    h_t = sum_{s<=t} L[t,s] dt_s x_s (x) B_s  +  exp(cum_t) S0                                       (P, N)

A gated delta rule has this form, too, with k for B, q for C, dt = 1, and for x the values u that it really writes. They
solve a triangular system in the chunk (Yang et al., "Parallelizing Linear Transformers with the Delta Rule", arXiv
2406.06484, section 3; with decay arXiv 2412.06464, section 3.3):

    u_t = beta_t (v_t - exp(cum_t) S0 k_t - sum_{s<t} L[t,s] (k_s . k_t) u_s)

Letters: b batch, T tokens, G groups (of the delta rule: key heads), K heads per group (H = G*K), P head dim (value
channels), N state (key channels), Q chunk length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from sspruner.graph.family import DeltaProjected, Projected

CHUNK = 64


@dataclass(frozen=True)
class Chunk:
    """Q consecutive steps of one mixer, and the state before them; fp32, or fp64 if the inputs are."""

    x: torch.Tensor  # (b, G, K, Q, P)
    dt: torch.Tensor  # (b, G, K, Q)
    B: torch.Tensor  # (b, G, Q, N)
    C: torch.Tensor  # (b, G, Q, N)
    L: torch.Tensor  # (b, G, K, Q, Q)  decay from step s to step t, 0 for s > t
    decay: torch.Tensor  # (b, G, K, Q)  exp(cum): decay from the chunk's entry to step t
    entry: torch.Tensor  # (b, G, K, P, N)  S0, the state that enters the chunk
    weight: torch.Tensor  # (b, 1, Q)  1 for a token that counts, 0 for padding


def chunks(p: Projected | DeltaProjected, mask: torch.Tensor | None = None, size: int = CHUNK) -> Iterator[Chunk]:
    """Iterate over a batch chunk by chunk, carrying the state. mask: bool (b, T), False where padding."""
    b, T, H, P = p.x.shape
    G, N = p.B.shape[2:]
    dtype = torch.promote_types(p.x.dtype, torch.float32)
    x = p.x.to(dtype).view(b, T, G, H // G, P).permute(0, 2, 3, 1, 4)  # (b, G, K, T, P)
    dt = p.dt.to(dtype).view(b, T, G, H // G).permute(0, 2, 3, 1)  # (b, G, K, T)
    B = p.B.to(dtype).transpose(1, 2)  # (b, G, T, N)
    C = p.C.to(dtype).transpose(1, 2)  # (b, G, T, N)
    rate = _log_decay(p).view(b, T, G, H // G).permute(0, 2, 3, 1)  # (b, G, K, T)
    weight = (torch.ones(b, T, device=x.device) if mask is None else mask).to(dtype)[:, None]  # (b, 1, T)
    state = x.new_zeros(b, G, H // G, P, N)
    for start in range(0, T, size):
        at = slice(start, start + size)
        # cum in fp64: the exponential of a difference of two large fp32 sums would be inexact.
        cum = rate[..., at].cumsum(-1)  # (b, G, K, Q)
        Q = cum.shape[-1]
        past = torch.ones(Q, Q, dtype=torch.bool, device=x.device).tril()
        L = (cum[..., :, None] - cum[..., None, :]).to(dtype).masked_fill_(~past, -torch.inf).exp_()
        chunk = Chunk(
            x=x[..., at, :].contiguous(),
            dt=dt[..., at],
            B=B[..., at, :],
            C=C[..., at, :],
            L=L,
            decay=cum.to(dtype).exp(),
            entry=state,
            weight=weight[..., at],
        )
        if isinstance(p, DeltaProjected):
            chunk = _written(chunk)
        yield chunk
        carried = chunk.x * (chunk.L[..., -1, :] * chunk.dt)[..., None]  # (b, G, K, Q, P)
        entered = per_group(carried.transpose(-1, -2), chunk.B)  # (b, G, K, P, N)
        state = entered.addcmul_(chunk.decay[..., -1, None, None], state)


def per_group(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Compute left (b, G, K, R, Q) @ right (b, G, Q, N), one product per group, heads stacked -> (b, G, K, R, N)."""
    b, G, K, R, Q = left.shape
    return (left.reshape(b, G, K * R, Q) @ right).view(b, G, K, R, -1)


def _log_decay(p: Projected | DeltaProjected) -> torch.Tensor:
    """Return the logarithm of each step's decay: fp64 (b, T, H)."""
    return p.decay.double() if isinstance(p, DeltaProjected) else p.dt.double() * p.A.double()


def _written(c: Chunk) -> Chunk:
    """Return a chunk of a delta rule with the values that it really writes, u for v, and dt = 1."""
    overlap = (c.B @ c.B.transpose(-1, -2))[:, :, None] * c.L * c.dt[..., None]  # (b, G, K, Q, Q): beta_t k_t . k_s L
    known = c.B[:, :, None] @ c.entry.transpose(-1, -2)  # (b, G, K, Q, P): k_t read from the entering state
    right = (c.x - c.decay[..., None] * known) * c.dt[..., None]
    u = torch.linalg.solve_triangular(overlap, right, upper=False, unitriangular=True)
    return replace(c, x=u, dt=torch.ones_like(c.dt))
