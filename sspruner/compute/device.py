"""Device placement of a model: on the compute device, in memory, or block by block on disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import groupby
from typing import Any

import torch
from torch import nn

from sspruner.errors import InputError

OFFLOADED = "_sspruner_offloaded"  # attribute of a model whose blocks are on disk: its io.offload.Blocks


def resolve_device(device: str | None) -> torch.device:
    """Return the compute device: the named one, else CUDA if available, else the CPU.

    Raises InputError for a device that is not available.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.zeros(1, device=resolved).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r}: not available here ({str(error).splitlines()[0]})") from error
    return resolved


@contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Context manager that moves the whole model to `device` and back.

    An offloaded model is not moved: its blocks go to the device one by one (calibrate.replay).
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
    """Return the io.offload.Blocks of a model whose blocks are on disk or other devices; None if it is in memory."""
    return getattr(model, OFFLOADED, None)


def check_whole(model: nn.Module, what: str) -> None:
    """Raise InputError for a model whose blocks are on disk or on several devices; `what` needs all of it at once."""
    if offloaded(model):
        raise InputError(f"{what}: the model's blocks lie apart; load it without offload and device_map")


def works_on(model: nn.Module, block: str, device: torch.device) -> torch.device:
    """Return the device on which a block computes: its accelerator if it has one, else `device`."""
    blocks = offloaded(model)
    home: torch.device = device if blocks is None else blocks.homes.get(block, device)
    return device if home.type == "cpu" else home


@contextmanager
def working_on(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Context manager that moves a module to `device`. Afterwards every tensor is restored: changes are lost."""
    originals = [
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
        for tensors, leaf, tensor, data in originals:
            if tensors[leaf] is tensor:
                tensor.data = data
            else:  # `to` has replaced the tensor
                tensors[leaf] = tensor  # type: ignore[assignment]


def moved(value: Any, device: torch.device, *, wide: bool = False) -> Any:
    """Move the tensors inside tuples, lists and dicts to `device`; wide: convert bf16 and fp16 to fp32."""
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
    """Context manager that keeps the weights of the module at `path` in memory if they are on disk."""
    blocks = offloaded(model)
    with nullcontext() if blocks is None else blocks.resident(path):
        yield


def in_turn(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield every parameter with its name, sorted by name. Its values are in memory until the next one is requested."""
    blocks = offloaded(model)
    names = sorted(name for name, _ in model.named_parameters())
    for block, block_names in groupby(names, lambda name: "" if blocks is None else blocks.block_of(name)):
        with resident(model, block):
            yield from ((name, model.get_parameter(name)) for name in block_names)
