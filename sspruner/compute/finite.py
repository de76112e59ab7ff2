"""Check that a model's weights are finite, and find the module whose output is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from sspruner.compute.device import in_turn
from sspruner.errors import ModelError

CHUNK = 2**24  # number of values checked at once


def check_finite(model: nn.Module, where: str = "") -> None:
    """Raise ModelError that names the first parameter with a NaN or infinite value. where: path of the model."""
    prefix = f"model {where}: " if where else ""
    for name, p in in_turn(model):
        bad = sum(int((~part.isfinite()).sum()) for part in torch.split(p.detach().flatten(), CHUNK))
        if bad:
            raise ModelError(
                f"{prefix}{name}: {bad} of {p.numel()} weights are NaN or infinite; the checkpoint is damaged"
            )


@torch.no_grad()
def refuse_not_finite(model: nn.Module, run: Callable[[], Any], path: str = "") -> None:
    """Raise ModelError that names the first module in `model` whose output is not finite while `run` runs it.

    path: where `model` is in the whole model. Does nothing if all outputs are finite.
    """
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            if not found and not all(part.isfinite().all() for part in _tensors(out)):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    if found:
        dtype = next(model.parameters()).dtype
        way_out = "use a shorter --seq-len, or other text"
        if dtype in (torch.float16, torch.bfloat16):
            way_out = "load the model with --dtype float32"
        where = ".".join(part for part in (path, found[0]) if part) or type(model).__name__
        name = str(dtype).removeprefix("torch.")
        raise ModelError(f"{where}: its output on the calibration text is not finite in {name}; {way_out}")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the floating-point tensors in an output."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
