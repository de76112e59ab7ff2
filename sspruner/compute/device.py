"""Where a model is: on the device that computes, in memory, or, block by block, on disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import groupby
from typing import Any

import torch
from torch import nn

from sspruner.errors import InputError

OFFLOADED = "_sspruner_offloaded"  # attribute of a model whose blocks lie on disk: what brings them (io.offload)


def resolve_device(device: str | None) -> torch.device:
    """The compute device: the one named, else CUDA if there is one, else the CPU. Raises InputError for no device."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r}: not available here ({str(error).splitlines()[0]})") from error
    return found


@contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The whole model on `device` inside the block, and back where it was after it.

    A model whose blocks lie apart stays where it is: its blocks go to the device one by one (calibrate.replay).
    """
    if offloaded(model):
        yield
        return
    home = next(model.parameters()).device
    model.to(device)
    try:
        yield
    finally:
        model.to(home)


def offloaded(model: nn.Module) -> Any:
    """What brings the blocks of a model from disk and other devices (io.offload.Blocks); None if it is in memory."""
    return getattr(model, OFFLOADED, None)


def check_whole(model: nn.Module, what: str) -> None:
    """Raise InputError for a model whose blocks lie on disk or on several devices; `what` needs all of it at once."""
    if offloaded(model):
        raise InputError(f"{what}: the model's blocks lie apart; load it without offload and device_map")


def works_on(model: nn.Module, block: str, device: torch.device) -> torch.device:
    """Where a block computes: on the accelerator that it stays on, else on `device`."""
    blocks = offloaded(model)
    home: torch.device = device if blocks is None else blocks.homes.get(block, device)
    return device if home.type == "cpu" else home


@contextmanager
def working_on(module: nn.Module, device: torch.device) -> Iterator[None]:
    """A module on `device` inside the block. After it every tensor is what it was, where it was: changes are lost."""
    held = [
        (tensors, leaf, tensor, tensor.data)
        for each in module.modules()
        for tensors in (each._parameters, each._buffers)
        for leaf, tensor in tensors.items()
        if tensor is not None
    ]
    module.to(device)
    try:
        yield
    finally:
        for tensors, leaf, tensor, data in held:
            if tensors[leaf] is tensor:
                tensor.data = data
            else:  # `to` has put another in its place
                tensors[leaf] = tensor  # type: ignore[assignment]


def moved(value: Any, device: torch.device, *, wide: bool = False) -> Any:
    """Tensors inside tuples, lists and dicts, on `device`; wide: bf16 and fp16 as fp32."""
    if isinstance(value, torch.Tensor):
        narrow = wide and value.dtype in (torch.bfloat16, torch.float16)
        return value.to(device, torch.float32 if narrow else value.dtype)
    if isinstance(value, dict):
        return {k: moved(v, device, wide=wide) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(moved(v, device, wide=wide) for v in value)
    return value


@contextmanager
def resident(model: nn.Module, path: str) -> Iterator[None]:
    """The weights of the module at `path` in memory inside the block, where they lie on disk."""
    blocks = offloaded(model)
    with nullcontext() if blocks is None else blocks.resident(path):
        yield


def in_turn(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter by its name, sorted, its values in memory until the next one is asked for."""
    blocks = offloaded(model)
    names = sorted(name for name, _ in model.named_parameters())
    for block, here in groupby(names, lambda name: "" if blocks is None else blocks.block_of(name)):
        with resident(model, block):
            yield from ((name, model.get_parameter(name)) for name in here)
