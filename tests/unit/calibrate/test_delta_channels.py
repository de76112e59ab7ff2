"""Exact statistics of a delta rule with a decay per key channel, against the step-by-step fp64 recurrence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sspruner.calibrate.delta_channels import energy_sum, ghost_sum, scan_output, weighted_ghost_sum
from sspruner.graph.family import DeltaProjected
from support.kda_state import energy, ghost, output, projections, rows, weighted_ghost
from support.mamba1_state import Storage, close

SIZES = st.sampled_from([1, 3, 16, 64])


@given(projections(), SIZES)
def test_statistics_equal_the_recurrence_in_fp32(drawn: tuple[DeltaProjected, torch.Tensor], size: int) -> None:
    p, mask = drawn
    close(ghost_sum(p, mask, size), ghost(p, mask))
    close(energy_sum(p, mask, size), energy(p, mask))
    close(scan_output(p, size), output(p))
    assert (ghost_sum(p).dtype, energy_sum(p).dtype, scan_output(p).dtype) == (torch.float64,) * 2 + (torch.float32,)


@given(projections(torch.float64), SIZES)
def test_the_algorithm_itself_is_exact(drawn: tuple[DeltaProjected, torch.Tensor], size: int) -> None:
    """In fp64 only rounding is left: a wrong term of any size would show."""
    p, mask = drawn
    close(ghost_sum(p, mask, size), ghost(p, mask), 1e-12)
    close(energy_sum(p, mask, size), energy(p, mask), 1e-12)
    close(scan_output(p, size), output(p), 1e-12)
    assert scan_output(p).dtype == torch.float64


@given(projections(torch.float64), SIZES)
def test_weights_by_value_channel_and_token(drawn: tuple[DeltaProjected, torch.Tensor], size: int) -> None:
    p, mask = drawn
    w = torch.rand(p.v.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    close(weighted_ghost_sum(p, w, mask, size), weighted_ghost(p, w, mask), 1e-12)
    close(weighted_ghost_sum(p, torch.ones_like(w), mask, size), ghost(p, mask), 1e-12)


@given(projections())
def test_a_bfloat16_model_is_summed_in_fp32(drawn: tuple[DeltaProjected, torch.Tensor]) -> None:
    """The values are what bfloat16 holds; nothing is rounded after that. q, k and the decay come in fp32."""
    p, mask = drawn
    p = replace(p, **{name: getattr(p, name).bfloat16() for name in ("v", "z", "beta")})
    close(ghost_sum(p, mask), ghost(p, mask))
    close(energy_sum(p, mask), energy(p, mask))
    close(scan_output(p), output(p))
    assert scan_output(p).dtype == torch.float32


@given(projections(torch.float64), st.data())
def test_the_score_is_the_squared_change_of_y(drawn: tuple[DeltaProjected, torch.Tensor], data: st.DataObject) -> None:
    """Channel n of head h is not read (q is 0 there): y of that head moves by that sum over all tokens."""
    p, mask = drawn
    H, K = p.q.shape[2:]
    h, n = data.draw(st.integers(0, H - 1)), data.draw(st.integers(0, K - 1))
    zeroed = p.q.clone()
    zeroed[..., h, n] = 0
    change = (output(p) - output(replace(p, q=zeroed))).square()  # (b, T, H, V)
    torch.testing.assert_close(ghost_sum(p)[h, n], change.sum(), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(ghost_sum(p, mask)[h, n], change[mask].sum(), rtol=1e-6, atol=1e-12)
    assert change[:, :, torch.arange(H) != h].sum() == 0


@given(projections())
def test_padding_does_not_enter_a_sum(drawn: tuple[DeltaProjected, torch.Tensor]) -> None:
    """A right-padded batch gives the sums of its unpadded rows, whatever stands in the padding."""
    p, _ = drawn
    b, T = p.v.shape[:2]
    lengths = [max(1, T - 3 * row) for row in range(b)]
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    for statistic in (ghost_sum, energy_sum):
        unpadded = [statistic(rows(p, slice(i, i + 1), slice(n))) for i, n in enumerate(lengths)]
        close(statistic(p, mask), sum(unpadded))
        assert statistic(p, torch.zeros_like(mask)).abs().max() == 0


@given(projections(torch.float64), st.data())
def test_a_batch_may_be_split(drawn: tuple[DeltaProjected, torch.Tensor], data: st.DataObject) -> None:
    """Samples do not see each other: any split of the batch gives the same sums and the same y."""
    p, mask = drawn
    b = p.v.shape[0]
    cuts = [0, *sorted(data.draw(st.sets(st.integers(1, b - 1)))), b] if b > 1 else [0, b]
    parts = [slice(start, stop) for start, stop in pairwise(cuts)]
    for statistic in (ghost_sum, energy_sum):
        close(sum(statistic(rows(p, part), mask[part]) for part in parts), statistic(p, mask), 1e-13)
    close(torch.cat([scan_output(rows(p, part)) for part in parts]), scan_output(p), 1e-13)


@pytest.mark.parametrize("statistic", [ghost_sum, energy_sum], ids=lambda f: f.__name__)
def test_memory_does_not_grow_with_the_sequence(statistic: Callable[..., torch.Tensor]) -> None:
    largest = []
    for T in (32, 320):
        q, k, v = (torch.randn(2, T, 2, 8) for _ in range(3))
        p = DeltaProjected(q, k / 3, v, v.flatten(2), torch.rand(2, T, 2), -torch.rand(2, T, 2, 8))
        with Storage(p) as storage:
            statistic(p)
        largest.append(storage.largest)
    assert largest[0] == largest[1] == 2 * 2 * 16 * 16 * 8 * 8  # one chunk: b H Q Q K decays, in fp64
