"""Arrays by the names of a forward's arguments, from .npz files: what models read that are no language models."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sspruner.compute.inputs import example_values, input_name
from sspruner.errors import InputError

SUFFIX = ".npz"


def is_arrays(source: Any) -> bool:
    """Check whether a source is the name of a file of arrays."""
    return isinstance(source, (str, Path)) and str(source).lower().endswith(SUFFIX)


def read_arrays(source: str | Path, what: str) -> dict[str, torch.Tensor]:
    """Read an .npz file: name -> int64 or fp32. what: the first word of errors. Nothing is unpickled.

    Raises InputError if it is missing, damaged, empty, or holds what is no number.
    """
    import numpy as np

    place, path = f"{what} {source}", Path(source).expanduser()
    if not path.is_file():
        raise InputError(f"{place}: no such file")
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{place}: cannot be read as arrays of numbers ({' '.join(str(error).split())})") from error
    if not arrays:
        raise InputError(f"{place}: empty")
    if strange := next((name for name, array in arrays.items() if array.dtype.kind not in "biuf"), None):
        raise InputError(f"{place}: the array {strange!r} is of type {arrays[strange].dtype}, not of numbers")
    return {name: as_numbers(array) for name, array in arrays.items()}


def as_numbers(values: Any) -> torch.Tensor:
    """Return a tensor or an array as int64 or fp32, copied: those of inference mode would forbid gradients."""
    tensor = torch.as_tensor(values).detach().cpu()
    return tensor.to(torch.float32 if tensor.is_floating_point() else torch.int64, copy=True)


def input_of(arrays: Mapping[str, torch.Tensor], model: Any, place: str) -> torch.Tensor:
    """Return the array that a model reads. place: the first words of errors. Raises InputError if it is not there."""
    name = input_name(model)
    if name not in arrays:
        raise InputError(f"{place}: has the arrays {', '.join(arrays)}; {type(model).__name__} reads {name!r}")
    return arrays[name]


def values_for(source: Any, model: Any, place: str) -> torch.Tensor:
    """Return a tensor or an array as the values that a model reads: fp32 (S, T, ...).

    Raises InputError for another source, another shape, and values that are not finite.
    """
    example, name = example_values(model), input_name(model)
    channels = tuple(example.shape[2:])
    shape = f"(windows, steps, {', '.join(map(str, channels))})"
    if not hasattr(source, "ndim") or getattr(source, "dtype", None) is None:
        raise InputError(
            f"{place}: {type(model).__name__} reads {name!r}, which are no token ids; give them as a tensor "
            f"{shape}, or as an array {name!r} in an .npz file"
        )
    values = as_numbers(source).float()
    if values.ndim != example.ndim or tuple(values.shape[2:]) != channels or not len(values):
        raise InputError(f"{place}: has the shape {tuple(values.shape)}; {type(model).__name__} reads {shape}")
    if not values.isfinite().all():
        raise InputError(f"{place}: {int((~values.isfinite()).sum())} values are NaN or infinite")
    return values
