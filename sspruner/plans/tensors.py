"""File with a plan's tensors beside plan.json: element masks packed to bits, all others unchanged."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sspruner.errors import PlanError

FOLDER = "sspruner"  # subfolder of a saved model that holds the tensors file, apart from the weights


def pack(elements: Mapping[str, torch.Tensor], updates: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the content of the tensors file: name -> uint8 (ceil(rows * cols / 8),) for a mask, or the new value."""
    masks = {name: torch.from_numpy(np.packbits(keep.cpu().numpy())) for name, keep in elements.items()}
    return masks | {name: value.detach().cpu().contiguous().clone() for name, value in updates.items()}


def unpack(packed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Unpack a mask: bool `shape`. Raises ValueError if the bytes do not have the size of such a mask."""
    if packed.dtype != torch.uint8 or packed.shape != (-(-prod(shape) // 8),):
        raise ValueError(f"{tuple(packed.shape)} bytes of {packed.dtype} are no mask of {shape}")
    bits = np.unpackbits(packed.numpy(), count=prod(shape)).astype(bool)
    return torch.from_numpy(bits).reshape(shape)


def digest(packed: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of every tensor's name, dtype, shape and bytes, independent of their order."""
    total = hashlib.sha256()
    for name, tensor in sorted(packed.items()):
        total.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def tensors_file(plan: Path) -> Path:
    """Return the path of a plan's tensors file: same name with the suffix .safetensors, or in a saved model's folder.

    Raises PlanError if there is none.
    """
    beside = plan.with_suffix(".safetensors")
    for path in (beside, plan.parent / FOLDER / beside.name):
        if path.is_file():
            return path
    raise PlanError(f"plan {plan}: its tensors are missing: no file {beside.name} beside it")


def read_tensors(plan: Path) -> dict[str, torch.Tensor]:
    """Read a plan's tensors file. Raises PlanError if it is missing or cannot be read."""
    path = tensors_file(plan)
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise PlanError(f"plan {plan}: {path.name} is corrupt or truncated ({error})") from error
    return tensors
