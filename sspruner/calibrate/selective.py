"""Exact statistics of a Mamba1 scan, whose decay differs per channel and state.

    h_t[p,n] = exp(dt_t[p] A[p,n]) h_{t-1}[p,n] + dt_t[p] x_t[p] B_t[n]
    y_t[p]   = sum_n h_t[p,n] C_t[n] + D[p] x_t[p]

Source: Gu & Dao, arXiv 2312.00752, section 3, with dt B for the discretised B as in their code. The sum over p has no
closed form in matrix products, as it has for Mamba2 in sspruner.calibrate.state. So the states are computed Q steps
at a time, summed and discarded: memory does not grow with T.

CPU time of the sum, one thread, fp32, T=256, G=1, P=384, N=16, at b=8 and at b=1:

    step by step, plain                                                    37 ms    12.7 ms
    in place                                                               26 ms     9.3 ms
    in place, P innermost in memory (it is long, N is short)               25 ms     8.9 ms
    chunks: decays and inputs of Q steps at once, then one                 24 ms     6.3 ms    Q = 4
      in-place multiply-add per step                                       24 ms     5.0 ms    Q = 8
                                                                           28 ms     4.6 ms    Q = 16
                                                                           47 ms     8.6 ms    Q = 64, out of the cache
    no loop over steps: log2 Q passes, each doubling the reach             42 ms     6.7 ms    Q = 8
    no loop over steps: exp(cum_t - cum_s) for s <= t, Q/2 times the exp   81 ms    14.1 ms    Q = 4

Hence chunks of 8. A GPU gets about 20 launches per chunk, and 80 from a loop over as many steps (counted, not timed).

Letters: b batch, T tokens, G groups with one B and C each (1 in Mamba1, the heads in Zamba), P channels per group,
N state, Q chunk length.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sspruner.graph.family import SelectiveProjected

CHUNK = 8


def chunks(p: SelectiveProjected, size: int = CHUNK) -> Iterator[tuple[slice, torch.Tensor]]:
    """Iterate over a batch `size` steps at a time: (steps, states (b, Q, G, N, P)); fp32, or fp64 if x is.

    The last state is carried into the next chunk: the states are read-only.
    """
    b, T, G, P = p.x.shape
    dtype = _dtype(p)
    A = p.A.to(dtype).transpose(-1, -2).contiguous()  # (G, N, P)
    state = A.new_zeros(b, G, A.shape[1], P)
    for start in range(0, T, size):
        at = slice(start, start + size)
        dt = p.dt[:, at].to(dtype)  # (b, Q, G, P)
        decay = (dt[..., None, :] * A).exp_()  # (b, Q, G, N, P)
        states = (dt * p.x[:, at].to(dtype))[..., None, :] * p.B[:, at].to(dtype)[..., None]  # (b, Q, G, N, P): inputs
        for t in range(states.shape[1]):
            state = states[:, t].addcmul_(decay[:, t], state)  # (b, G, N, P): the input of step t becomes its state
        yield at, states


def ghost_sum(p: SelectiveProjected, mask: torch.Tensor | None = None, size: int = CHUNK) -> torch.Tensor:
    """Sum h_t[p,n]^2 C_t[n]^2 over samples, tokens and channels of the group: fp64 (G, N).

    GHOST's joint sum: the product is taken inside the sum. Source: Menezes & Kyrillidis, arXiv 2602.11408, for Mamba2;
    here it is the squared change of y when state n is zeroed, which is exact, too (docs/methods.md).
    mask: bool (b, T), False where padding.
    """
    return _energy_sum(p, mask, size, observed=True)


def weighted_ghost_sum(
    p: SelectiveProjected, w: torch.Tensor, mask: torch.Tensor | None = None, size: int = CHUNK
) -> torch.Tensor:
    """Sum w_t[p] h_t[p,n]^2 C_t[n]^2 over samples, tokens and channels of the group: fp64 (G, N).

    w: (b, T, G, P), not negative. Costs as much as ghost_sum. mask: bool (b, T), False where padding.
    """
    return _energy_sum(p, mask, size, observed=True, w=w)


def energy_sum(p: SelectiveProjected, mask: torch.Tensor | None = None, size: int = CHUNK) -> torch.Tensor:
    """Sum h_t[p,n]^2 over samples, tokens and channels of the group: fp64 (G, N). mask: bool (b, T).

    The diagonal of the controllability Gramian; source: Moore, IEEE TAC 26(1), 1981, as an empirical sum.
    """
    return _energy_sum(p, mask, size, observed=False)


def _energy_sum(
    p: SelectiveProjected, mask: torch.Tensor | None, size: int, observed: bool, w: torch.Tensor | None = None
) -> torch.Tensor:
    total = torch.zeros(p.B.shape[2:], dtype=torch.float64, device=p.x.device)
    for at, states in chunks(p, size):
        q = states.square()  # (b, Q, G, N, P)
        q = q.sum(-1) if w is None else (q @ w[:, at, :, :, None].to(q.dtype)).squeeze(-1)  # (b, Q, G, N)
        if observed:
            q *= p.C[:, at].to(q.dtype).square()
        if mask is not None:
            q *= mask[:, at, None, None]
        total += q.sum((0, 1), dtype=torch.float64)
    return total


def scan_output(p: SelectiveProjected, size: int = CHUNK) -> torch.Tensor:
    """Compute y_t = C_t . h_t + D x_t, the scan's output before the gate: (b, T, G, P); fp32, or fp64 if x is.

    Source: Gu & Dao, arXiv 2312.00752, equation 2b, with the skip D of their code.
    """
    y = p.x.to(_dtype(p)) * p.D.to(_dtype(p))  # (b, T, G, P)
    for at, states in chunks(p, size):
        y[:, at] += (p.C[:, at].to(y.dtype)[..., None, :] @ states).squeeze(-2)  # (b, Q, G, 1, N) @ (b, Q, G, N, P)
    return y


def _dtype(p: SelectiveProjected) -> torch.dtype:
    return torch.promote_types(p.x.dtype, torch.float32)


def energy_by_channel(p: SelectiveProjected, mask: torch.Tensor | None = None, size: int = CHUNK) -> torch.Tensor:
    """Sum h_t[p,n]^2 over samples and tokens, for each channel: fp64 (G, P, N). mask: bool (b, T).

    Its sum over the channels is energy_sum. Source: Tuo & Wang, arXiv 2506.09613, who weigh A_log^2 by it.
    """
    total = torch.zeros(p.A.shape, dtype=torch.float64, device=p.x.device)
    for at, states in chunks(p, size):
        q = states.square()  # (b, Q, G, N, P)
        if mask is not None:
            q *= mask[:, at, None, None, None]
        total += q.sum((0, 1), dtype=torch.float64).transpose(-1, -2)
    return total
