"""Round a recurrent state to a narrow number format: int8, fp8 (e4m3), bf16 or fp16, in three ways.

    nearest      q = round(h / s) s, ties to even
    stochastic   the neighbour above with probability (h / s - neighbour below) / spacing, so that the mean of q is h
    feedback     q = round((h + e) / s) s, and e becomes h + e - q: what one rounding leaves over, the next one adds

Int8 and fp8 are stored with a scale s, one fp32 number for each row along the last dimension, the N states: for each
head and head_dim of Mamba2, each channel of Mamba1. s = amax / largest, so that the largest value of a row becomes the
largest number of the format. bf16 and fp16 have no scale. These are the scales of vLLM's pull request 52962. An engine
keeps e in few bits; here it is fp32, which is the best case.

Pure functions on fp32 tensors, exact to the last digit: a value that the format has is not changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

POWER = 0x7F800000  # the bits of an fp32 number that say its power of two
SCALE_BYTES = 4


@dataclass(frozen=True)
class Format:
    """Number format of a stored state.

    largest    largest number
    digits     binary digits after the leading one
    exponent   power of two of the smallest normal number. Smaller ones, and all of int8, are evenly spaced
    itemsize   bytes
    scaled     whether each row has a scale
    """

    largest: float
    digits: int
    exponent: int
    itemsize: int
    scaled: bool


FORMATS = {
    "int8": Format(127.0, 6, 6, 1, scaled=True),
    "fp8": Format(448.0, 3, -6, 1, scaled=True),
    "bf16": Format(float(torch.finfo(torch.bfloat16).max), 7, -126, 2, scaled=False),
    "fp16": Format(65504.0, 10, -14, 2, scaled=False),
}


def scales(state: torch.Tensor, form: Format) -> torch.Tensor:
    """Return the scale of each row, fp32 (..., 1); 1 for a row of zeros, and without scales. state: (..., N)."""
    if not form.scaled:
        return torch.ones_like(state[..., :1])
    scale = state.abs().amax(-1, keepdim=True) / form.largest
    return torch.where(scale > 0, scale, 1.0)


def spacing(values: torch.Tensor, form: Format) -> torch.Tensor:
    """Return the distance between the two numbers of the format around each value, fp32: one for all if it is even."""
    if form.largest < 2.0 ** (form.exponent + 1):
        return torch.tensor(2.0 ** (form.exponent - form.digits), device=values.device)
    powers = (values.view(torch.int32) & POWER).view(torch.float32)  # 2 ** floor(log2 |value|), 0 for the smallest
    return powers.clamp_min_(2.0**form.exponent).mul_(2.0**-form.digits)


def rounded(state: torch.Tensor, form: Format, noise: torch.Tensor | None = None) -> torch.Tensor:
    """Return the state as it is read again after it was stored. state: fp32 (..., N).

    noise: uniform in [0, 1), in the shape of the state: rounds stochastically. Without it, rounds to the nearest.
    """
    scale = scales(state, form)
    values = state / scale if form.scaled else state.clone()
    step = spacing(values, form)
    steps = values.div_(step)  # exact: the step is a power of two
    if noise is None:
        whole = steps.round_()
    else:
        below = steps.floor()
        whole = below + (noise < steps - below)
    stored = whole.mul_(step).clamp_(-form.largest, form.largest)
    return stored.mul_(scale) if form.scaled else stored


def fed_back(state: torch.Tensor, residual: torch.Tensor, form: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to the nearest with error feedback: return the stored state and the new residual, both fp32 (..., N).

    Over many steps the stored states sum up to the states, up to the first and the last residual.
    """
    due = state + residual
    stored = rounded(due, form)
    return stored, due - stored


def stored_bytes(shape: Sequence[int], form: Format) -> int:
    """Return the bytes of a state of this shape, (..., N), with its scales."""
    return prod(shape) * form.itemsize + (prod(shape[:-1]) * SCALE_BYTES if form.scaled else 0)
