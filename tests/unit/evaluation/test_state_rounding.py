"""Rounding of states: against torch's own casts, and the laws of the three kinds of rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sspruner.evaluation.state_rounding import FORMATS, fed_back, rounded, scales, spacing, stored_bytes

CASTS = {"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = sorted(FORMATS)


def grid(name: str) -> torch.Tensor:
    """Every finite number of a format that torch has, or of int8: fp32, sorted."""
    if name == "int8":
        return torch.arange(-127, 128).float()
    bits = torch.arange(256, dtype=torch.uint8) if name == "fp8" else torch.arange(-(2**15), 2**15, dtype=torch.int16)
    values = bits.view(CASTS[name]).float()
    return values[values.isfinite()].unique()


@st.composite
def states(draw: st.DrawFn, largest: float = 3e4) -> torch.Tensor:
    """Draw fp32 states (rows, N) whose values span many powers of two; some rows are zero."""
    rows, n, seed = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(0, 2**32 - 1))
    generator = torch.Generator().manual_seed(seed)
    powers = torch.randint(-30, 1, (rows, n), generator=generator).float().exp2()
    signs = torch.rand(rows, n, generator=generator) * 2 - 1
    zero = torch.rand(rows, 1, generator=generator) < 0.2
    return largest * powers * signs * ~zero


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("noise", [None, 0.0, 1 - 2.0**-24])
def test_every_number_of_a_format_stays_to_the_last_digit(name: str, noise: float | None) -> None:
    values = grid(name)
    assert len(values) == {"int8": 255, "fp8": 253, "bf16": 65279, "fp16": 63487}[name]  # of e4m3: no infinity
    row = values[None]  # its amax is the largest number, so that a scale is 1
    chance = None if noise is None else torch.full_like(row, noise)
    assert torch.equal(rounded(row, FORMATS[name], chance), row)


@pytest.mark.parametrize("name", sorted(CASTS))
@given(states())
def test_nearest_is_torchs_own_cast(name: str, state: torch.Tensor) -> None:
    form = FORMATS[name]
    scale = scales(state, form)
    assert torch.equal(rounded(state, form), (state / scale).to(CASTS[name]).float() * scale)


@given(states())
def test_int8_is_the_nearest_of_255_values_of_each_row(state: torch.Tensor) -> None:
    scale = state.double().abs().amax(-1, keepdim=True) / 127
    choices = torch.arange(-127, 128).double() * scale[..., None]  # (rows, 1, 255)
    best = (choices - state.double()[..., None]).abs().amin(-1)
    assert torch.allclose(
        (rounded(state, FORMATS["int8"]).double() - state).abs(), best, rtol=0, atol=float(scale.max()) / 1e5
    )


@pytest.mark.parametrize("name", NAMES)
@given(states(), st.integers(0, 100))
def test_errors_are_at_most_half_a_step_and_one_step_if_stochastic(name: str, state: torch.Tensor, seed: int) -> None:
    form = FORMATS[name]
    step = spacing(state / scales(state, form), form) * scales(state, form)
    slack = 1 + 1e-5  # of the scale's own rounding
    for noise, most in ((None, 0.5), (uniform(*state.shape, seed=seed), 1.0)):
        error = (rounded(state, form, noise) - state).abs()
        assert bool((error <= most * slack * step + 2e-7 * state.abs()).all())


@pytest.mark.parametrize("name", NAMES)
@given(st.floats(-1, 1, width=32), st.integers(0, 8))
def test_stochastic_rounding_has_the_value_as_its_mean(name: str, value: float, seed: int) -> None:
    """With random numbers spread evenly over [0, 1), the mean is the value, up to one of them."""
    form, n = FORMATS[name], 4096
    row = torch.tensor([1.0, value, value / 7]).repeat(n, 1)  # the scale is of the first
    noise = ((torch.arange(n) + uniform(1, seed=seed)) / n).clamp_max(1 - 2.0**-24)[:, None].expand(n, 3)
    step = spacing(row[0] / scales(row[:1], form)[0], form) * scales(row[:1], form)[0]
    error = (rounded(row, form, noise).double().mean(0) - row[0].double()).abs()
    assert bool((error <= 2 * step / n + 1e-6 * row[0].abs()).all())


@pytest.mark.parametrize("name", NAMES)
@given(states(), st.integers(1, 20), st.integers(0, 100))
def test_feedback_telescopes(name: str, state: torch.Tensor, steps: int, seed: int) -> None:
    """What was stored sums up to what came in, less the last residual, and no residual exceeds half a step."""
    form = FORMATS[name]
    came, stored = torch.zeros_like(state).double(), torch.zeros_like(state).double()
    residual = torch.zeros_like(state)
    for step in range(steps):
        now = state * (0.5 + uniform(*state.shape, seed=seed + step))
        out, residual = fed_back(now, residual, form)
        came, stored = came + now, stored + out
    assert torch.allclose(came, stored + residual, rtol=0, atol=1e-6 * steps * float(state.abs().max() + 1e-30))
    row = state.abs().amax(-1, keepdim=True) * 1.6
    coarsest = row / 127 if name == "int8" else row * 2.0**-form.digits
    assert bool((residual.abs() <= coarsest.clamp_min(2.0 ** (form.exponent - form.digits) * (not form.scaled))).all())


def test_feedback_carries_small_updates_that_nearest_loses() -> None:
    """A state that grows by less than half a step: nearest stays where it is for ever, feedback follows."""
    form, update = FORMATS["int8"], 0.3 / 127
    nearest, followed = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    residual = torch.zeros_like(followed)
    for _ in range(100):
        nearest = rounded(nearest + torch.tensor([[0.0, update]]), form)
        followed, residual = fed_back(followed + torch.tensor([[0.0, update]]), residual, form)
    assert nearest[0, 1] == 0
    assert abs(float(followed[0, 1]) - 100 * update) <= 0.5 / 127 * 1.01


@given(states(), st.integers(0, 3))
def test_rows_do_not_see_each_other(state: torch.Tensor, shift: int) -> None:
    noise = uniform(*state.shape)
    for form in FORMATS.values():
        whole = rounded(state, form, noise)
        assert torch.equal(
            torch.cat([rounded(s, form, n) for s, n in zip(state.split(1), noise.split(1), strict=True)]), whole
        )
        assert torch.equal(rounded(state.roll(shift, 0), form, noise.roll(shift, 0)), whole.roll(shift, 0))


def test_what_is_not_finite_stays_visible() -> None:
    for form in FORMATS.values():
        assert bool(rounded(torch.tensor([[1.0, float("nan")]]), form)[0, 1].isnan())


def test_stored_bytes_count_scales() -> None:
    shape = (8, 64, 128)  # heads, head_dim, N
    sizes = {name: stored_bytes(shape, form) for name, form in FORMATS.items()}
    plain = 8 * 64 * 128
    assert sizes == {"int8": plain + 8 * 64 * 4, "fp8": plain + 8 * 64 * 4, "bf16": 2 * plain, "fp16": 2 * plain}
