"""Exact statistics of gated delta rules against the recurrence, one token at a time in fp64."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from sspruner.calibrate import state
from sspruner.graph.family import DeltaProjected
from support.mamba2_state import TOLERANCE, close
from support.oracle import delta_states


@st.composite
def projections(draw: st.DrawFn, dtype: torch.dtype = torch.float32) -> tuple[DeltaProjected, torch.Tensor]:
    """Draw projections with any T, unit keys, strengths up to 2, decays from none to all, and padding anywhere."""
    b, T = draw(st.integers(1, 3)), draw(st.integers(1, 150))
    G, R, K, V = (draw(st.integers(1, 3)) for _ in range(4))
    K += 1
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    exponent = draw(st.sampled_from([-6.0, -2.0, 0.0, 1.5]))
    k = normal(b, T, G, K)
    p = DeltaProjected(
        q=normal(b, T, G, K),
        k=k / k.norm(dim=-1, keepdim=True),
        v=normal(b, T, G * R, V),
        z=normal(b, T, G * R * V),
        beta=draw(st.sampled_from([0.1, 1.0, 2.0])) * torch.rand(b, T, G * R, generator=generator, dtype=dtype),
        decay=-(10 ** (exponent + torch.rand(b, T, G * R, generator=generator, dtype=dtype))),
    )
    return p, torch.rand(b, T, generator=generator) < draw(st.sampled_from([0.3, 0.9, 1.0]))


def by_group(per_head: torch.Tensor, p: DeltaProjected) -> torch.Tensor:
    """Sum over the value heads of each key head: (H, ...) -> (G, ...)."""
    G = p.k.shape[2]
    return per_head.unflatten(0, (G, -1)).sum(1)


def check(p: DeltaProjected, mask: torch.Tensor, w: torch.Tensor, chunk: int, tolerance: float) -> None:
    """Check every sum of one batch against the stored states."""
    S, counted = delta_states(p), mask.double()
    q = p.q.double().repeat_interleave(p.v.shape[2] // p.k.shape[2], 2)  # (b, T, H, K)
    weight = w.double() * counted[..., None, None]
    close(state.scan_output(p, chunk), torch.einsum("bthvk,bthk->bthv", S, q), tolerance)
    close(state.state_energy(p, chunk), S.square().sum(-2), tolerance)
    energy = S.square().sum(-2) * counted[..., None, None]  # (b, T, H, K)
    close(state.energy_sum(p, mask, chunk), by_group(energy.sum((0, 1)), p), tolerance)
    close(state.ghost_sum(p, mask, chunk), by_group((energy * q.square()).sum((0, 1)), p), tolerance)
    close(state.gramian(p, mask, chunk), by_group(torch.einsum("bthvk,bthvl,bt->hkl", S, S, counted), p), tolerance)
    weighted = torch.einsum("bthvk,bthvl,bthv->hkl", S, S, weight)
    close(state.weighted_gramian(p, w, mask, min(chunk, 16)), by_group(weighted, p), tolerance)
    joint = torch.einsum("bthvk,bthk,bthv->hk", S.square(), q.square(), weight)
    close(state.weighted_ghost_sum(p, w, mask, min(chunk, 4)), by_group(joint, p), tolerance)


@given(projections(), st.sampled_from([1, 7, 64]))
def test_statistics_equal_the_recurrence_in_fp32(drawn: tuple[DeltaProjected, torch.Tensor], chunk: int) -> None:
    p, mask = drawn
    check(p, mask, p.z.square().view(p.v.shape), chunk, TOLERANCE)


@given(projections(torch.float64), st.sampled_from([1, 7, 64]))
def test_the_algorithm_itself_is_exact(drawn: tuple[DeltaProjected, torch.Tensor], chunk: int) -> None:
    """In fp64 only rounding is left: a wrong term of any size would show."""
    p, mask = drawn
    check(p, mask, p.z.square().view(p.v.shape), chunk, 1e-10)


@given(projections(torch.float64))
def test_sums_add_up_over_sequences(drawn: tuple[DeltaProjected, torch.Tensor]) -> None:
    p, mask = drawn
    rows = [DeltaProjected(**{n: value[i : i + 1] for n, value in vars(p).items()}) for i in range(len(mask))]
    for statistic in (state.ghost_sum, state.energy_sum, state.gramian):
        apart = sum(statistic(row, mask[i : i + 1]) for i, row in enumerate(rows))
        close(statistic(p, mask), torch.as_tensor(apart), 1e-12)


def test_a_key_that_is_written_again_replaces_its_value() -> None:
    """With strength 1 and no decay the state answers with the last value of a key: an associative memory."""
    key = torch.eye(3)[None, [0, 1, 0], None]  # (1, T, 1, K)
    v = torch.tensor([1.0, 2.0, 5.0]).view(1, 3, 1, 1)
    ones = torch.ones(1, 3, 1)
    p = DeltaProjected(q=key, k=key, v=v, z=torch.zeros(1, 3, 1), beta=ones, decay=torch.zeros(1, 3, 1))
    assert state.scan_output(p).flatten().tolist() == [1.0, 2.0, 5.0]
    assert state.energy_sum(p).tolist() == [[1 + 1 + 25, 4 + 4, 0]]
