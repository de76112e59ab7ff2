"""Data-parallel calibration: each process observes a part of the sequences, and sums are taken over all processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from sspruner.calibrate.sources import Calibration
from sspruner.compute.processes import gathered, rank, total, world
from sspruner.errors import InputError, PluginError

Total = Callable[[Any], Any]  # a tensor, a number, or a dict of such -> the sum over all processes


def part_of_this_process(data: Calibration) -> Calibration:
    """Return the sequences rank, rank + world, ... of the observed ones.

    Raises InputError if a process would have none.
    """
    if len(data.tokens) < world():
        raise InputError(
            f"calibration: {len(data.tokens)} sequences for {world()} processes; give each at least one with "
            "--samples, or start fewer"
        )
    part = slice(rank(), None, world())
    return replace(data, tokens=data.tokens[part], mask=data.mask[part])


def summed(value: Any) -> Any:
    """Sum a tensor, a number, or a dict of them over processes.

    All processes call it for the same things in the same order.

    A process without data may pass the number it started with, and its dict may lack keys: they count as a tensor
    filled with that number, and as 0. Tensors are summed in their own dtype. Raises PluginError for shapes that differ.
    """
    if isinstance(value, dict):
        keys = dict.fromkeys(key for keys in gathered([*value]) for key in keys)
        return {key: summed(value.get(key, 0)) for key in keys}
    kinds = gathered((value.shape, value.dtype) if isinstance(value, torch.Tensor) else value)
    tensors = {kind for kind in kinds if isinstance(kind, tuple)}
    if not tensors:
        return sum(kinds)
    if len(tensors) > 1:
        shapes = ", ".join(sorted(f"{tuple(shape)} {dtype}" for shape, dtype in tensors))
        raise PluginError(f"what it sums differs between processes: {shapes}")
    ((shape, dtype),) = tensors
    if not isinstance(value, torch.Tensor):
        return total(torch.full(shape, value, dtype=dtype))
    return total(value.detach().to("cpu", copy=True).contiguous()).to(value.device)
