"""The plain fp64 recurrence that every clever path is compared with. Slow and obvious on purpose."""

from __future__ import annotations

import torch

from sspruner.graph.family import Projected


def states(p: Projected) -> torch.Tensor:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t (x) B_t, one step at a time: fp64 (b, T, H, P, N)."""
    b, T, H, P = p.x.shape
    G, N = p.B.shape[2:]
    x, dt, A = p.x.double(), p.dt.double(), p.A.double()
    B = p.B.double().repeat_interleave(H // G, 2)  # (b, T, H, N)
    h = torch.zeros(b, H, P, N, dtype=torch.float64)
    steps = []
    for t in range(T):
        decay = torch.exp(dt[:, t] * A)[..., None, None]  # (b, H, 1, 1)
        h = decay * h + dt[:, t, :, None, None] * x[:, t, :, :, None] * B[:, t, :, None, :]
        steps.append(h)
    return torch.stack(steps, 1)


def output(p: Projected) -> torch.Tensor:
    """y_t = C_t . h_t + D x_t: fp64 (b, T, H, P)."""
    C = p.C.double().repeat_interleave(p.x.shape[2] // p.C.shape[2], 2)  # (b, T, H, N)
    return torch.einsum("bthpn,bthn->bthp", states(p), C) + p.D.double()[:, None] * p.x.double()


def state_energy(p: Projected) -> torch.Tensor:
    """sum_p h^2: fp64 (b, T, H, N)."""
    return states(p).square().sum(3)


def ghost_sum(p: Projected, mask: torch.Tensor) -> torch.Tensor:
    """sum over samples, tokens, heads of the group and p of h^2 C^2: fp64 (G, N)."""
    b, T, H, _ = p.x.shape
    G, N = p.B.shape[2:]
    q = state_energy(p).view(b, T, G, H // G, N) * mask[..., None, None, None]
    return (q.sum(3) * p.C.double().square()).sum((0, 1))


def gramian(p: Projected, mask: torch.Tensor) -> torch.Tensor:
    """sum over samples, tokens, heads of the group and p of h h^T: fp64 (G, N, N)."""
    b, T, H, P = p.x.shape
    G, N = p.B.shape[2:]
    h = states(p).view(b, T, G, H // G, P, N) * mask[..., None, None, None, None]
    return torch.einsum("btgkpn,btgkpm->gnm", h, h)
