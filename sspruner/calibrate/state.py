"""Exact statistics of the recurrent state, without materialising the states.

Storing h_t for all t costs T*H*P*N. Every sum that a scorer needs has a closed form inside a chunk of Q steps,
given the state S0 that enters the chunk (methods note, section 1; derivation in docs/methods.md). With
cum_t = sum of dt*A from the chunk's first step to t, L[t,s] = exp(cum_t - cum_s) for s <= t, and

    h_t = sum_{s<=t} L[t,s] dt_s x_s (x) B_s  +  exp(cum_t) S0                                       (P, N)

the products over P become the Q x Q matrix x x^T, and the rest are matrix products of size Q x Q x N. Memory is
one chunk: it does not grow with T, and only S0 has size P*N.

Letters: b batch, T tokens, G groups, K heads per group (H = G*K), P head dim, N state, Q chunk length.
"""

from __future__ import annotations

import torch

from sspruner.calibrate.chunks import CHUNK, Chunk, chunks, per_group
from sspruner.graph.family import DeltaProjected, Projected

Scalar = Projected | DeltaProjected  # one decay per head
WEIGHTED = 16  # chunk length where weights differ by channel: Q P numbers, Q^2 P products for each token and head
EXPLICIT = 4  # steps whose states are in memory at once where a sum needs the states themselves


def state_energy(p: Scalar, size: int = CHUNK) -> torch.Tensor:
    """Compute q[b,t,h,n] = sum_p h_t[p,n]^2, the energy of each state: (b, T, H, N)."""
    energies = []
    for c in chunks(p, size=size):
        injected = c.L.square() @ _injection(c)  # (b, G, K, Q, N)
        entered = c.decay.square()[..., None] * c.entry.square().sum(-2, keepdim=True)
        energies.append((injected + entered).flatten(1, 2).transpose(1, 2))  # (b, Q, H, N)
    return torch.cat(energies, 1).clamp_min(0)


def weighted_energy(c: Chunk, w: torch.Tensor) -> torch.Tensor:
    """Sum w[b,g,t,n] * q[b,t,k,n] over batch, steps and heads of one chunk: w (b, G, Q, N) -> (G, N).

    sum_t w_t q_t = sum_s u_s (L^2)^T w: the transposed form needs one matrix product for all heads of a group, and
    u = 2 dt B (r + dt |x|^2 B / 2) is expanded inside the sum, which takes few passes over memory.
    """
    inner = _half_overlap(c)  # (b, G, K, Q, N)
    inner.mul_(per_group(c.L.square().transpose(-1, -2), w))
    injected = torch.einsum("bgkq,bgkqn->bgqn", 2 * c.dt, inner) * c.B  # (b, G, Q, N)
    entered = c.entry.square().sum(-2) * per_group(c.decay.square()[..., None, :], w).squeeze(-2)  # (b, G, K, N)
    return injected.sum((0, 2)) + entered.sum((0, 2))


def ghost_sum(p: Scalar, mask: torch.Tensor | None = None, size: int = CHUNK) -> torch.Tensor:
    """Sum h_t[k,p,n]^2 C_t[g,n]^2 over samples, tokens, heads of the group and p: fp64 (G, N).

    GHOST's joint sum: the product is taken inside the sum. Source: Menezes & Kyrillidis, arXiv 2602.11408.
    """
    return _energy_sum(p, mask, size, observed=True)


def weighted_ghost_sum(
    p: Scalar, w: torch.Tensor, mask: torch.Tensor | None = None, size: int = EXPLICIT
) -> torch.Tensor:
    """Sum w_t[k,p] h_t[k,p,n]^2 C_t[g,n]^2 over samples, tokens, heads of the group and p: fp64 (G, N).

    w: (b, T, H, P), not negative. It differs by p and t, so the products over P do not become x x^T. The states are
    computed for `size` steps at a time and summed by a matrix product over the steps: Q P N multiplications per token
    and head, and memory of b Q H P N numbers. For the choice of the weights see docs/scorers/ghost.md.
    """
    b, T, H, P = p.x.shape
    G, N = p.B.shape[2:]
    w = w.view(b, T, G, H // G, P).permute(0, 2, 3, 1, 4)  # (b, G, K, T, P)
    total, start = torch.zeros(G, N, dtype=torch.float64, device=p.x.device), 0
    for c in chunks(p, mask, size):
        Q = c.x.shape[-2]
        coef = (c.L * c.dt[..., None, :])[..., None, :] * c.x.transpose(-1, -2)[..., None, :, :]  # (b, G, K, Q, P, Q)
        h = per_group(coef.flatten(3, 4), c.B).view(*coef.shape[:-1], N)  # (b, G, K, Q, P, N)
        h.addcmul_(c.decay[..., None, None], c.entry[:, :, :, None])
        counted = (w[..., start : start + Q, :] * c.weight[:, :, None, :, None]).to(h.dtype)  # (b, G, K, Q, P)
        q = (counted[..., None, :] @ h.square_()).squeeze(-2).sum(2)  # (b, G, Q, N)
        total += (q * c.C.square()).sum((0, 2), dtype=torch.float64)
        start += Q
    return total


def energy_sum(p: Scalar, mask: torch.Tensor | None = None, size: int = CHUNK) -> torch.Tensor:
    """Sum h_t[k,p,n]^2 over samples, tokens, heads of the group and p: fp64 (G, N). The Gramian's diagonal."""
    return _energy_sum(p, mask, size, observed=False)


def _energy_sum(p: Scalar, mask: torch.Tensor | None, size: int, observed: bool) -> torch.Tensor:
    total = torch.zeros(p.B.shape[2:], dtype=torch.float64, device=p.x.device)
    for c in chunks(p, mask, size):
        w = c.C.square() if observed else torch.ones_like(c.C)
        total += weighted_energy(c, w * c.weight[..., None])
    return total.clamp_min(0)


def gramian(p: Scalar, mask: torch.Tensor | None = None, size: int = CHUNK) -> torch.Tensor:
    """Compute W_c = sum over samples, tokens, heads of the group and p of h_t h_t^T: (G, N, N), symmetric, fp64."""
    total = _no_gramian(p)
    for c in chunks(p, mask, size):
        coef = c.L * c.dt[..., None, :]  # (b, G, K, Q, Q): h_t = sum_s coef[t,s] x_s (x) B_s + decay_t S0
        counted = c.weight[:, :, None, :, None]  # 1 for steps t that are not padding
        inside = (c.x @ c.x.transpose(-1, -2)) * (coef.transpose(-1, -2) @ (coef * counted))  # (b, G, K, Q, Q)
        reach = coef.transpose(-1, -2) @ (c.decay[..., None] * counted)  # (b, G, K, Q, 1)
        left = (c.decay.square()[..., None] * counted).sum(-2)  # (b, G, K, 1)
        total += _chunk_gramian(c, inside, reach, left)
    return (total + total.transpose(-1, -2)) / 2  # symmetric up to rounding; now exactly


def weighted_gramian(
    p: Scalar, w: torch.Tensor, mask: torch.Tensor | None = None, size: int = WEIGHTED
) -> torch.Tensor:
    """Sum w_t[k,p] h_t h_t^T over samples, tokens, heads of the group and p: (G, N, N), symmetric, fp64.

    w: (b, T, H, P), not negative. In a chunk h_t[p] is a sum over steps s of z_tp[s] B_s, plus decay_t S0[p]. With the
    weights multiplied into z, the sum over t and p is one product z^T z of size Q x Q for each head: Q^2 P
    multiplications per token and head, and memory of b H Q^2 P numbers. The states are never computed.
    """
    b, T, H, P = p.x.shape
    G = p.B.shape[2]
    w = w.view(b, T, G, H // G, P).permute(0, 2, 3, 1, 4)  # (b, G, K, T, P)
    total, start = _no_gramian(p), 0
    for c in chunks(p, mask, size):
        Q = c.x.shape[-2]
        coef = c.L * c.dt[..., None, :]  # (b, G, K, Q, Q)
        counted = w[..., start : start + Q, :].to(coef) * c.weight[:, :, None, :, None]  # (b, G, K, Q, P)
        z = (coef[..., None, :] * counted.sqrt()[..., None]).mul_(c.x.transpose(-1, -2)[..., None, :, :])
        z = z.flatten(3, 4)  # (b, G, K, Q P, Q)
        reach = coef.transpose(-1, -2) @ (c.decay[..., None] * counted)  # (b, G, K, Q, P)
        left = (c.decay.square()[..., None] * counted).sum(-2)  # (b, G, K, P)
        total += _chunk_gramian(c, z.transpose(-1, -2) @ z, reach, left)
        start += Q
    return (total + total.transpose(-1, -2)) / 2


def observability(C: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Compute W_o = sum over samples and tokens of C_t C_t^T: (G, N, N), fp64. C: (b, T, G, N)."""
    counted = C[mask].double()  # (tokens, G, N)
    return torch.einsum("tgn,tgm->gnm", counted, counted)


def _no_gramian(p: Scalar) -> torch.Tensor:
    G, N = p.B.shape[2:]
    return torch.zeros(G, N, N, dtype=torch.float64, device=p.x.device)


def _chunk_gramian(c: Chunk, inside: torch.Tensor, reach: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """Compute B^T inside B + B^T cross + cross^T B + S0^T left S0, summed over batch and heads of a group: (G, N, N).

    inside: (b, G, K, Q, Q) between steps; reach: (b, G, K, Q, P) from a step to the entering state, or (.., 1) for all
    p; left: (b, G, K, P) or (b, G, K, 1), of the entering state. Heads share B, so they are summed before the product
    with B.
    """
    cross = ((reach * c.x) @ c.entry).sum(2)  # (b, G, Q, N)
    half = inside.sum(2) @ c.B / 2 + cross  # (b, G, Q, N)
    stepped = torch.einsum("bgqn,bgqm->gnm", c.B, half)
    entered = torch.einsum("bgkpn,bgkpm->gnm", left[..., None] * c.entry, c.entry)
    return stepped + stepped.transpose(-1, -2) + entered


def scan_output(p: Scalar, size: int = CHUNK) -> torch.Tensor:
    """Compute y_t = C_t . h_t + D x_t, without a D S_t^T q_t, the scan's output before gate and norm: (b, T, H, P)."""
    outputs = []
    for c in chunks(p, size=size):
        score = (c.C @ c.B.transpose(-1, -2))[:, :, None] * c.L * c.dt[..., None, :]  # (b, G, K, Q, Q)
        carried = c.decay[..., None] * (c.C[:, :, None] @ c.entry.transpose(-1, -2))  # (b, G, K, Q, P)
        outputs.append((score @ c.x + carried).flatten(1, 2).transpose(1, 2))  # (b, Q, H, P)
    y = torch.cat(outputs, 1)
    if isinstance(p, DeltaProjected):
        return y
    return y + p.D.to(y.dtype).reshape(len(p.D), -1) * p.x.to(y.dtype)  # D (H,), or (H, P) in some models


def _injection(c: Chunk) -> torch.Tensor:
    """Compute u_t[n] = dB_t[n] (2 r_t[n] + dB_t[n] |x_t|^2), the energy that step t adds: (b, G, K, Q, N).

    r_t[n] = x_t . (decayed h_{t-1})[:, n], so that |h_t|^2 = exp(2 dt A) |h_{t-1}|^2 + u_t.
    """
    return 2 * c.dt[..., None] * c.B[:, :, None] * _half_overlap(c)


def _half_overlap(c: Chunk) -> torch.Tensor:
    """Compute r_t[n] + dB_t[n] |x_t|^2 / 2: (b, G, K, Q, N)."""
    overlap = (c.x @ c.x.transpose(-1, -2)).mul_(c.L).mul_(c.dt[..., None, :])  # (b, G, K, Q, Q)
    overlap.diagonal(dim1=-2, dim2=-1).mul_(0.5)  # s < t whole, s = t by half: r and |x|^2 dt / 2 in one product
    return per_group(overlap, c.B).addcmul_(c.decay[..., None], c.x @ c.entry)
