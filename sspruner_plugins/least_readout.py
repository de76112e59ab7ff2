"""Orthogonal basis of a delta rule's keys in which the first directions lose least of what queries read.

A delta rule writes and erases with the same key, so only a rotation of keys and queries leaves it as it is; an oblique
change of basis would need two keys. Of the directions U[:, :k] that are kept, with P = U[:, :k] U[:, :k]^T,

    err_k = tr((I - P) Q (I - P) C)        Q = E[q q^T], C = E[k k^T] after the l2 norm

is the mean square of what the queries would read through the lost directions, if they did not depend on what was
written. One ordered basis serves every k: it minimises the sum of log err_k over a sixteenth to three quarters of the
directions, from the best of four starts, by Adam over the Q factor of a QR decomposition. What it costs a model:
docs/results/delta-rules.md.
"""

from __future__ import annotations

import torch

KEPT = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)  # of the directions: where the error counts
STEPS, RATE = 150, 1e-2
TINY = 1e-12  # relative to the error without any direction


def least_readout_basis(read: torch.Tensor, written: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return U (G, N, N), directions in columns, and the errors with the first 0, 1, .. N-1 of them, fp64 (G, N).

    read, written: Q and C, fp64 (G, N, N), symmetric, positive semidefinite up to rounding.
    """
    read, written = (_unit_trace(moment) for moment in (read, written))
    best = _best_start(read, written)
    with torch.enable_grad(), torch.inference_mode(False):
        free = best.clone().requires_grad_()
        optimizer = torch.optim.Adam([free], lr=RATE)
        least = _cost(best, read, written)  # (G,)
        for _ in range(STEPS):
            U = torch.linalg.qr(free).Q
            cost = _cost(U, read, written)
            better = cost < least
            best = torch.where(better[:, None, None], U.detach(), best)
            least = torch.where(better, cost.detach(), least)
            (free.grad,) = torch.autograd.grad(cost.sum(), free)
            optimizer.step()
    return best, readout_errors(best, read, written)


def readout_errors(U: torch.Tensor, read: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
    """Return err_k for k = 0 .. N-1: (G, N). U: (G, N, N), directions in columns."""
    lost = (U.mT @ read @ U) * (U.mT @ written @ U)  # (G, N, N): err_k is the sum of its block from k on
    errors: torch.Tensor = lost.flip(-1, -2).cumsum(-1).cumsum(-2).diagonal(dim1=-2, dim2=-1).flip(-1)
    return errors


def _cost(U: torch.Tensor, read: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
    """Return the sum of log err_k over the sizes that count: (G,)."""
    errors, N = readout_errors(U, read, written), U.shape[-1]
    sizes = sorted({min(max(round(part * N), 1), N - 1) for part in KEPT}) if N > 1 else [0]
    return (errors[:, sizes] + TINY * errors[:, :1].detach()).log().sum(-1)


def _best_start(read: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
    """Return the best of: principal directions of either moment and of their sum, and the balanced pair's."""
    product = torch.linalg.svd(_root(read).mT @ _root(written))
    starts = [_principal(moment) for moment in (read, written, read + written)]
    starts.append(torch.linalg.qr(_root(written) @ product.Vh.mT).Q)
    costs = torch.stack([_cost(U, read, written) for U in starts])  # (starts, G)
    return torch.stack(starts)[costs.argmin(0), torch.arange(len(read), device=read.device)]


def _principal(moment: torch.Tensor) -> torch.Tensor:
    """Return eigenvectors in columns, those of the largest eigenvalues first: (G, N, N)."""
    vectors: torch.Tensor = torch.linalg.eigh(moment).eigenvectors
    return vectors.flip(-1)


def _root(moment: torch.Tensor) -> torch.Tensor:
    """Return L with L L^T = the moment, small eigenvalues raised to a floor: (G, N, N)."""
    values, vectors = torch.linalg.eigh(moment)
    root: torch.Tensor = vectors * values.clamp_min(TINY).sqrt()[:, None]
    return root


def _unit_trace(moment: torch.Tensor) -> torch.Tensor:
    trace = moment.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    return moment / trace.where(trace > 0, 1.0)
