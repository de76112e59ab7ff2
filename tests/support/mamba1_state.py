"""Projections of one Mamba1 mixer, and its step-by-step recurrence in fp64."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from sspruner.graph.family import SelectiveProjected

TOLERANCE = 1e-5  # relative, of every sum in fp32


def states(p: SelectiveProjected) -> torch.Tensor:
    """Return h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t, one step at a time: fp64 (b, T, G, P, N). Slow reference."""
    x, dt, A, B = p.x.double(), p.dt.double(), p.A.double(), p.B.double()
    b, T, G, P = x.shape
    h = torch.zeros(b, G, P, A.shape[-1], dtype=torch.float64)
    steps = []
    for t in range(T):
        decay = torch.exp(dt[:, t, :, :, None] * A)  # (b, G, P, N)
        h = decay * h + dt[:, t, :, :, None] * x[:, t, :, :, None] * B[:, t, :, None, :]
        steps.append(h)
    return torch.stack(steps, 1)


def slow_energy(p: SelectiveProjected, mask: torch.Tensor) -> torch.Tensor:
    return (states(p).square() * mask[..., None, None, None]).sum((0, 1, 3))


def slow_output(p: SelectiveProjected) -> torch.Tensor:
    return torch.einsum("btgpn,btgn->btgp", states(p), p.C.double()) + p.D.double() * p.x.double()


@st.composite
def projections(draw: st.DrawFn, dtype: torch.dtype = torch.float32) -> tuple[SelectiveProjected, torch.Tensor]:
    """Draw projections of any shape, with decays from exp(-1e-8) to exp(-300) in one sequence, and padding."""
    b, T = draw(st.integers(1, 3)), draw(st.integers(1, 70))
    G, P, N = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    def power(slowest: float, fastest: float, *shape: int) -> torch.Tensor:
        return 10 ** (slowest + (fastest - slowest) * torch.rand(shape, generator=generator, dtype=dtype))

    slowest, fastest = sorted(draw(st.tuples(*[st.sampled_from([-6.0, -2.0, 0.0, 1.5])] * 2)))
    p = SelectiveProjected(
        x=normal(b, T, G, P),
        z=normal(b, T, G * P),
        dt=power(slowest, fastest, b, T, G, P),
        A=-power(-2, 1, G, P, N),
        B=normal(b, T, G, N),
        C=normal(b, T, G, N),
        D=normal(G, P),
    )
    return p, torch.rand(b, T, generator=generator) < draw(st.sampled_from([0.3, 0.9, 1.0]))


def rows(p: SelectiveProjected, at: slice, steps: slice = slice(None)) -> SelectiveProjected:
    """Return some samples of a batch, at some steps of the sequence."""
    return replace(p, **{name: getattr(p, name)[at, steps] for name in ("x", "z", "dt", "B", "C")})


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """Check that all elements agree within `tolerance` of the largest."""
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    error = (actual.double() - expected).abs().max()
    assert error <= tolerance * expected.abs().max(), f"{error:.2e} of {expected.abs().max():.2e}"


class Storage(TorchDispatchMode):
    """Torch mode that records the largest storage returned by an operation inside, except views of older tensors."""

    def __init__(self, p: SelectiveProjected) -> None:
        super().__init__()
        self.inputs = {getattr(p, name).untyped_storage().data_ptr() for name in vars(p)}
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.inputs:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result
