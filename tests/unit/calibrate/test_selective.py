"""Exact statistics of Mamba1 against the step-by-step fp64 recurrence, and against mambapy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sspruner.calibrate.selective import chunks, energy_sum, ghost_sum, scan_output
from sspruner.graph.family import SelectiveProjected
from support.mamba1_state import Storage, close, projections, rows, slow_energy, slow_output, states

SIZES = st.sampled_from([1, 3, 8, 64])


def slow_ghost(p: SelectiveProjected, mask: torch.Tensor) -> torch.Tensor:
    observed = states(p) * p.C.double()[..., None, :]  # (b, T, G, P, N)
    return (observed.square() * mask[..., None, None, None]).sum((0, 1, 3))


@given(projections(), SIZES)
def test_statistics_equal_the_recurrence_in_fp32(drawn: tuple[SelectiveProjected, torch.Tensor], size: int) -> None:
    p, mask = drawn
    close(ghost_sum(p, mask, size), slow_ghost(p, mask))
    close(energy_sum(p, mask, size), slow_energy(p, mask))
    close(scan_output(p, size), slow_output(p))
    assert (ghost_sum(p).dtype, energy_sum(p).dtype, scan_output(p).dtype) == (torch.float64,) * 2 + (torch.float32,)


@given(projections(torch.float64), SIZES)
def test_the_algorithm_itself_is_exact(drawn: tuple[SelectiveProjected, torch.Tensor], size: int) -> None:
    """In fp64 only rounding is left: a wrong term of any size would show."""
    p, mask = drawn
    close(ghost_sum(p, mask, size), slow_ghost(p, mask), 1e-12)
    close(energy_sum(p, mask, size), slow_energy(p, mask), 1e-12)
    close(scan_output(p, size), slow_output(p), 1e-12)
    assert scan_output(p).dtype == torch.float64


@given(projections())
def test_a_bfloat16_model_is_summed_in_fp32(drawn: tuple[SelectiveProjected, torch.Tensor]) -> None:
    """The values are what bfloat16 holds; nothing is rounded after that. dt comes in fp32, as from the mixer."""
    p, mask = drawn
    p = replace(p, **{name: getattr(p, name).bfloat16() for name in ("x", "z", "B", "C", "D")})
    close(ghost_sum(p, mask), slow_ghost(p, mask))
    close(energy_sum(p, mask), slow_energy(p, mask))
    close(scan_output(p), slow_output(p))
    assert scan_output(p).dtype == torch.float32


@given(projections(torch.float64), st.data())
def test_the_score_is_the_squared_change_of_y(
    drawn: tuple[SelectiveProjected, torch.Tensor], data: st.DataObject
) -> None:
    """State n of group g is zeroed in C, or in B: y moves by that sum over all tokens, and no other group moves."""
    p, mask = drawn
    p = replace(p, D=torch.zeros_like(p.D))  # it cancels in the difference, and takes its last digits along
    G, N = p.C.shape[2:]
    g, n = data.draw(st.integers(0, G - 1)), data.draw(st.integers(0, N - 1))
    name = data.draw(st.sampled_from(["B", "C"]))
    zeroed = getattr(p, name).clone()
    zeroed[..., g, n] = 0
    change = (scan_output(p) - scan_output(replace(p, **{name: zeroed}))).square()  # (b, T, G, P)
    torch.testing.assert_close(ghost_sum(p)[g, n], change.sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(ghost_sum(p, mask)[g, n], change[mask].sum(), rtol=1e-6, atol=0)
    assert change[:, :, torch.arange(G) != g].sum() == 0


@given(projections())
def test_padding_does_not_enter_a_sum(drawn: tuple[SelectiveProjected, torch.Tensor]) -> None:
    """A right-padded batch gives the sums of its unpadded rows, whatever stands in the padding."""
    p, _ = drawn
    b, T = p.x.shape[:2]
    lengths = [max(1, T - 3 * row) for row in range(b)]
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    for statistic in (ghost_sum, energy_sum):
        unpadded = [statistic(rows(p, slice(i, i + 1), slice(n))) for i, n in enumerate(lengths)]
        close(statistic(p, mask), sum(unpadded))
        assert statistic(p, torch.zeros_like(mask)).abs().max() == 0


@given(projections(torch.float64), st.data())
def test_a_batch_may_be_split(drawn: tuple[SelectiveProjected, torch.Tensor], data: st.DataObject) -> None:
    """Samples do not see each other: any split of the batch gives the same sums and the same y."""
    p, mask = drawn
    b = p.x.shape[0]
    cuts = [0, *sorted(data.draw(st.sets(st.integers(1, b - 1)))), b] if b > 1 else [0, b]
    parts = [slice(start, stop) for start, stop in pairwise(cuts)]
    for statistic in (ghost_sum, energy_sum):
        close(sum(statistic(rows(p, part), mask[part]) for part in parts), statistic(p, mask), 1e-13)
    close(torch.cat([scan_output(rows(p, part)) for part in parts]), scan_output(p), 1e-13)


@given(projections(torch.float64))
def test_groups_are_independent(drawn: tuple[SelectiveProjected, torch.Tensor]) -> None:
    """Zamba's heads: each group alone gives its row of the sums and its channels of y."""
    p, mask = drawn
    names = ("x", "dt", "B", "C")
    G = p.A.shape[0]
    alone = [
        replace(p, A=p.A[[g]], D=p.D[[g]], **{name: getattr(p, name)[:, :, [g]] for name in names}) for g in range(G)
    ]
    close(torch.cat([ghost_sum(one, mask) for one in alone]), ghost_sum(p, mask), 1e-13)
    close(torch.cat([energy_sum(one, mask) for one in alone]), energy_sum(p, mask), 1e-13)
    close(torch.cat([scan_output(one) for one in alone], 2), scan_output(p), 1e-13)


def test_slowest_and_fastest_decay_stay_finite() -> None:
    """dt*A of -1e6 beside -1e-9: nothing overflows, nothing is NaN, and the sums are still right."""
    T = 45
    dt = torch.full((1, T, 1, 2), 1e-9)
    dt[0, ::17] = 1e5
    p = SelectiveProjected(
        x=torch.randn(1, T, 1, 2), z=torch.zeros(1, T, 2), dt=dt, A=-torch.tensor([[[1.0, 10.0, 0.1]] * 2]),
        B=torch.randn(1, T, 1, 3), C=torch.randn(1, T, 1, 3), D=torch.ones(1, 2),
    )  # fmt: skip
    everything = torch.ones(1, T, dtype=torch.bool)
    close(ghost_sum(p), slow_ghost(p, everything))
    close(energy_sum(p), slow_energy(p, everything))


def long(T: int, b: int = 2, G: int = 1, P: int = 8, N: int = 4) -> SelectiveProjected:
    return SelectiveProjected(
        x=torch.randn(b, T, G, P), z=torch.randn(b, T, G * P), dt=torch.rand(b, T, G, P), A=-torch.rand(G, P, N),
        B=torch.randn(b, T, G, N), C=torch.randn(b, T, G, N), D=torch.randn(G, P),
    )  # fmt: skip


@pytest.mark.parametrize("statistic", [ghost_sum, energy_sum], ids=lambda f: f.__name__)
def test_memory_does_not_grow_with_the_sequence(statistic: Callable[..., torch.Tensor]) -> None:
    largest = []
    for T in (16, 160):
        p = long(T)
        with Storage(p) as storage:
            statistic(p)
        largest.append(storage.largest)
    assert largest[0] == largest[1] == 2 * 8 * 8 * 4 * 4  # one chunk: b Q P N, in bytes


def test_chunks_cover_the_sequence_once() -> None:
    p = long(21)
    seen = [(at.start, states_.shape[1]) for at, states_ in chunks(p, 8)]
    assert seen == [(0, 8), (8, 8), (16, 5)]
    torch.testing.assert_close(
        torch.cat([s for _, s in chunks(p, 8)], 1).transpose(-1, -2), states(p), check_dtype=False, rtol=1e-5, atol=1e-6
    )


def mambapy_block() -> torch.nn.Module:
    """A MambaBlock of mambapy with random weights."""
    mamba = pytest.importorskip(
        "mambapy.mamba", reason="the independent oracle for Mamba1: pip install --no-deps mambapy"
    )
    torch.manual_seed(0)
    block = mamba.MambaBlock(mamba.MambaConfig(d_model=6, n_layers=1, d_state=5, pscan=True))
    torch.nn.init.normal_(block.A_log)  # as after training: nothing alike in two channels or states
    torch.nn.init.normal_(block.D)
    torch.nn.init.normal_(block.dt_proj.bias)
    return block


def run(block: torch.nn.Module, u: torch.Tensor) -> tuple[SelectiveProjected, torch.Tensor]:
    """(what the block feeds to its scan, what the scan returns), recorded on the way through its own forward."""
    scan, recorded = block.selective_scan, []

    def record(x, delta, A, B, C, D):  # type: ignore[no-untyped-def]
        y = scan(x, delta, A, B, C, D)
        recorded.append((x, delta, A, B, C, D, y))
        return y

    block.selective_scan = record
    try:
        with torch.no_grad():
            block(u)
    finally:
        block.selective_scan = scan
    x, dt, A, B, C, D, y = recorded[0]
    p = SelectiveProjected(
        x=x[:, :, None], z=torch.zeros_like(x), dt=dt[:, :, None], A=A[None],
        B=B[:, :, None], C=C[:, :, None], D=D[None],
    )  # fmt: skip
    return p, y


def test_output_is_mambapys() -> None:
    """By its parallel scan and by its loop."""
    block = mambapy_block()
    p, y = run(block, torch.randn(3, 37, 6))
    torch.testing.assert_close(scan_output(p).squeeze(2), y, rtol=1e-4, atol=1e-5)
    loop = block.selective_scan_seq(p.x[:, :, 0], p.dt[:, :, 0], p.A[0], p.B[:, :, 0], p.C[:, :, 0], p.D[0])
    torch.testing.assert_close(scan_output(p).squeeze(2), loop, rtol=1e-4, atol=1e-5)


def test_score_is_what_a_cut_costs_in_mambapy() -> None:
    """Row n of C in x_proj is zeroed, mambapy runs again: its y has moved by the sum. So it does for row n of B."""
    block = mambapy_block()
    u = torch.randn(3, 37, 6)
    p, y = run(block, u)
    expected = ghost_sum(p)[0]  # (N,)
    rank, N = block.config.dt_rank, block.config.d_state
    weight = block.x_proj.weight.detach().clone()
    for first in (rank, rank + N):  # rows of B, rows of C
        for n in range(N):
            with torch.no_grad():
                block.x_proj.weight[first + n] = 0
            moved = (run(block, u)[1] - y).double().square().sum()
            with torch.no_grad():
                block.x_proj.weight.copy_(weight)
            torch.testing.assert_close(moved, expected[n], rtol=1e-4, atol=0)
