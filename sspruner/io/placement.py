"""Placement of a model's blocks on devices, in memory, or on disk, by accelerate's device map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sspruner.compute.device import resolve_device
from sspruner.errors import InputError, install
from sspruner.graph.site import within

AUTO, DISK = "auto", "disk"
USED = 0.8  # fraction of the free memory to fill: the rest is for activations, one more block, and its fp32 copy

Place = int | str  # as in accelerate's maps: the number of a GPU, "cpu", "disk", or a device's name


def check_device_map(device_map: Any, max_memory: Any) -> None:
    """Raise InputError for an invalid device map, and for memory limits without device_map="auto"."""
    if device_map is not None and device_map != AUTO and not isinstance(device_map, Mapping):
        raise InputError(f"device_map {device_map!r}: must be {AUTO}, or in Python a mapping from module to place")
    if max_memory is not None and device_map != AUTO:
        raise InputError(f"max_memory says how much device_map={AUTO!r} may fill: give that, too")


def places(
    model: nn.Module,
    blocks: list[str],
    shared: int,
    device_map: str | Mapping[str, Place],
    max_memory: Mapping[Place, int | str] | None,
) -> dict[str, Place]:
    """Return the place of each block. `auto` fills GPUs evenly, then memory, then the disk, like transformers.

    model       on the meta device, in its dtype
    shared      bytes that are in memory in any case
    max_memory  bytes by place, such as {0: "20GiB", "cpu": "60GiB"}; places that it leaves out are not used. By default
                four fifths of the free memory

    Raises InputError for places that do not exist.
    """
    where = _auto(model, blocks, shared, max_memory) if isinstance(device_map, str) else _given(blocks, device_map)
    for place in {*where.values()} - {DISK}:
        device_of(place)
    return where


def device_of(place: Place) -> torch.device:
    """Return the device of a place. Raises InputError if it does not exist."""
    try:
        name = str(torch.device(place))
    except RuntimeError as error:
        raise InputError(f"device map: no place {place!r} here") from error
    return resolve_device(name)


def _given(blocks: list[str], device_map: Mapping[str, Place]) -> dict[str, Place]:
    """Resolve a user's map from modules to places: the innermost entry around a block decides."""
    for name in device_map:
        if inside := next((block for block in blocks if name != block and within(name, block)), None):
            raise InputError(f"device map: {name} is a part of {inside}; a block is in one place")
    where = {}
    for block in blocks:
        around = [name for name in device_map if not name or within(block, name)]
        if not around:
            raise InputError(f"device map: says nothing of {block}; name it, a module around it, or '' for all")
        where[block] = device_map[max(around, key=len)]
    return where


def _auto(
    model: nn.Module, blocks: list[str], shared: int, max_memory: Mapping[Place, int | str] | None
) -> dict[str, Place]:
    try:
        from accelerate.utils import get_balanced_memory, get_max_memory, infer_auto_device_map
    except ImportError as error:
        raise InputError(f"device_map needs the package accelerate: {install('train')}") from error
    for place in {*(max_memory or ())} - {"cpu", DISK}:
        device_of(place)
    path = blocks[0].rpartition(".")[0]
    modules = model.get_submodule(path)
    whole = sorted({type(module).__name__ for module in modules.children()})
    try:
        limits = get_max_memory(None if max_memory is None else dict(max_memory))
        if max_memory is None:
            limits = {place: int(USED * size) for place, size in limits.items()}
        if "cpu" in limits:
            limits["cpu"] = max(0, limits["cpu"] - shared)
        limits = get_balanced_memory(modules, limits, no_split_module_classes=whole)
        block_places = infer_auto_device_map(modules, limits, no_split_module_classes=whole)
    except ValueError as error:
        raise InputError(f"max_memory: {' '.join(str(error).split())}") from error
    return _given(blocks, {f"{path}.{name}" if name else path: place for name, place in block_places.items()})
