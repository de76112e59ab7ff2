"""Where a model computes: the device that was asked for, and the whole model on it for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sspruner.errors import InputError


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
    """The whole model on `device` inside the block, and back where it was after it."""
    home = next(model.parameters()).device
    model.to(device)
    try:
        yield
    finally:
        model.to(home)
