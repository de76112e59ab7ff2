"""Exact statistics of a delta rule whose decay differs by key channel (KDA), without storing states for every token.

    S_t = a_t S_{t-1} + k_t u_t^T      u_t = beta_t (v_t - (a_t S_{t-1})^T k_t)      y_t = S_t^T q_t         S (K, V)

Source: "Kimi Linear", arXiv 2510.26692. Inside a chunk of Q steps, given the state S0 that enters it, and with cum_t
the sum of log a from the chunk's first step to t, D[t,s] = exp(cum_t - cum_s) k_s and E_t = exp(cum_t), by key channel,

    S_t[n] = E_t[n] S0[n] + sum_{s<=t} D[t,s,n] u_s                                                      (V,)

and the u of all steps solve one triangular system. Sums over the value channels become the products u_s . u_r and
u_s . S0[n], so that the states inside a chunk are never computed: Q K numbers and Q K products for each token and head.
The decays differ by channel, so D has the size Q Q K, which keeps chunks short.

Letters: b batch, T tokens, H heads, K key channels, V value channels, Q chunk length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sspruner.graph.family import DeltaProjected

CHUNK = 16
EXPLICIT = 4  # steps whose states are in memory at once where a sum needs the states themselves


@dataclass(frozen=True)
class Chunk:
    """Q consecutive steps of one mixer, and the state before them; fp32, or fp64 if v is."""

    q: torch.Tensor  # (b, H, Q, K)
    u: torch.Tensor  # (b, H, Q, V)  what step s adds to the state, beside k_s
    D: torch.Tensor  # (b, H, Q, Q, K)  k_s decayed from step s to step t, 0 for s > t
    E: torch.Tensor  # (b, H, Q, K)  decay from the chunk's entry to step t
    entry: torch.Tensor  # (b, H, K, V)  S0, the state that enters the chunk
    weight: torch.Tensor  # (b, 1, Q, 1)  1 for a token that counts, 0 for padding


def chunks(p: DeltaProjected, mask: torch.Tensor | None = None, size: int = CHUNK) -> Iterator[Chunk]:
    """Iterate over a batch chunk by chunk, carrying the state. mask: bool (b, T), False where padding."""
    b, T, H, V = p.v.shape
    dtype = torch.promote_types(p.v.dtype, torch.float32)
    q, k, v = (part.to(dtype).transpose(1, 2) for part in (p.q, p.k, p.v))  # (b, H, T, K), K and V
    beta = p.beta.to(dtype).transpose(1, 2)[..., None]  # (b, H, T, 1)
    weight = (torch.ones(b, T, device=v.device) if mask is None else mask).to(dtype)[:, None, :, None]  # (b, 1, T, 1)
    state = v.new_zeros(b, H, k.shape[-1], V)
    for start in range(0, T, size):
        at = slice(start, start + size)
        cum = p.decay[:, at].double().cumsum(1).transpose(1, 2)  # (b, H, Q, K); its differences are small
        Q = cum.shape[-2]
        past = torch.ones(Q, Q, dtype=torch.bool, device=v.device).tril()[..., None]
        D = (cum[..., :, None, :] - cum[..., None, :, :]).to(dtype).masked_fill_(~past, -torch.inf).exp_()
        D.mul_(k[:, :, None, at])  # (b, H, Q, Q, K)
        E = cum.to(dtype).exp()
        reads = (D @ k[:, :, at, :, None]).squeeze(-1) * beta[:, :, at]  # (b, H, Q, Q): beta_t k_t . D[t,s]
        given = beta[:, :, at] * (v[:, :, at] - (k[:, :, at] * E) @ state)  # (b, H, Q, V)
        u = torch.linalg.solve_triangular(reads, given, upper=False, unitriangular=True)  # reads its lower part alone
        yield Chunk(q[:, :, at], u, D, E, state, weight[:, :, at])
        state = E[:, :, -1, :, None] * state + D[:, :, -1].transpose(-1, -2) @ u


def scan_output(p: DeltaProjected, size: int = CHUNK) -> torch.Tensor:
    """Compute y_t = S_t^T q_t, the scan's output before norm and gate: (b, T, H, V); fp32, or fp64 if v is."""
    outputs = []
    for c in chunks(p, size=size):
        reads = (c.D @ c.q[..., None]).squeeze(-1)  # (b, H, Q, Q): q_t . D[t,s]
        outputs.append((reads @ c.u + (c.q * c.E) @ c.entry).transpose(1, 2))  # (b, Q, H, V)
    return torch.cat(outputs, 1)


def ghost_sum(p: DeltaProjected, mask: torch.Tensor | None = None, size: int = CHUNK) -> torch.Tensor:
    """Sum S_t[n,v]^2 q_t[n]^2 over samples, tokens and value channels: fp64 (H, K).

    GHOST's joint sum: the squared change of y when key channel n of the state is not read. Source: Menezes &
    Kyrillidis, arXiv 2602.11408, for Mamba2. mask: bool (b, T), False where padding.
    """
    return _energy_sum(p, mask, size, observed=True)


def energy_sum(p: DeltaProjected, mask: torch.Tensor | None = None, size: int = CHUNK) -> torch.Tensor:
    """Sum S_t[n,v]^2 over samples, tokens and value channels: fp64 (H, K). mask: bool (b, T), False where padding."""
    return _energy_sum(p, mask, size, observed=False)


def _energy_sum(p: DeltaProjected, mask: torch.Tensor | None, size: int, observed: bool) -> torch.Tensor:
    total = torch.zeros(p.k.shape[2:], dtype=torch.float64, device=p.v.device)
    for c in chunks(p, mask, size):
        energy = _energy(c)  # (b, H, Q, K)
        if observed:
            energy *= c.q.square()
        total += (energy * c.weight).sum((0, 2), dtype=torch.float64)
    return total.clamp_min(0)


def _energy(c: Chunk) -> torch.Tensor:
    """Compute sum_v S_t[n,v]^2 for each step of a chunk: (b, H, Q, K)."""
    inside = (c.u @ c.u.transpose(-1, -2))[:, :, None] @ c.D  # (b, H, Q, Q, K): sum_r u_s . u_r D[t,r]
    across = (c.u @ c.entry.transpose(-1, -2))[:, :, None]  # (b, H, 1, Q, K): u_s . S0[n]
    inside += 2 * c.E[..., None, :] * across
    return (inside * c.D).sum(-2) + c.E.square() * c.entry.square().sum(-1)[:, :, None]


def weighted_ghost_sum(
    p: DeltaProjected, w: torch.Tensor, mask: torch.Tensor | None = None, size: int = EXPLICIT
) -> torch.Tensor:
    """Sum w_t[v] S_t[n,v]^2 q_t[n]^2 over samples, tokens and value channels: fp64 (H, K).

    w: (b, T, H, V), not negative. The weights differ by v and t, so the states are computed, `size` steps at a time.
    """
    total, start = torch.zeros(p.k.shape[2:], dtype=torch.float64, device=p.v.device), 0
    for c in chunks(p, mask, size):
        states = c.D.transpose(-1, -2) @ c.u[:, :, None] + c.E[..., None] * c.entry[:, :, None]  # (b, H, Q, K, V)
        steps = w[:, start : start + states.shape[2]].transpose(1, 2)  # (b, H, Q, V)
        counted = (states.square_() @ steps.to(states.dtype)[..., None]).squeeze(-1)  # (b, H, Q, K)
        total += (counted * c.q.square() * c.weight).sum((0, 2), dtype=torch.float64)
        start += states.shape[2]
    return total
