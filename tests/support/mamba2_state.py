"""Projections of one Mamba2 mixer in fp64, and the tolerance of its statistics."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from sspruner.graph.family import Projected

TOLERANCE = 1e-4  # relative, of every sum in fp32


@st.composite
def projections(draw: st.DrawFn, dtype: torch.dtype = torch.float32) -> tuple[Projected, torch.Tensor]:
    """Draw projections with any T, one or more groups, decays from exp(-1e-6) to exp(-30), and padding anywhere."""
    b, T = draw(st.integers(1, 3)), draw(st.integers(1, 150))
    G, K, P, N = (draw(st.integers(1, 3)) for _ in range(4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    slowest, fastest = sorted(draw(st.tuples(*[st.sampled_from([-6.0, -2.0, 0.0, 1.5])] * 2)))
    exponent = slowest + (fastest - slowest) * torch.rand(b, T, G * K, generator=generator, dtype=dtype)
    p = Projected(
        x=normal(b, T, G * K, P),
        z=normal(b, T, G * K * P),
        dt=10**exponent,
        A=-torch.rand(G * K, generator=generator, dtype=dtype) - 0.01,
        B=normal(b, T, G, N),
        C=normal(b, T, G, N),
        D=normal(G * K),
    )
    return p, torch.rand(b, T, generator=generator) < draw(st.sampled_from([0.3, 0.9, 1.0]))


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """Check that all elements agree within `tolerance` of the largest."""
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    error = (actual.double() - expected).abs().max() if actual.numel() else torch.tensor(0.0)
    assert error <= tolerance * expected.abs().max(), f"{error:.2e} of {expected.abs().max():.2e}"
