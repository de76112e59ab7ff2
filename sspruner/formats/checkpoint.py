"""Read and write weights in a folder: one file, or shards with an index, as safetensors or pickled tensors."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from sspruner.errors import ModelError
from sspruner.formats.convolutions import split_convolutions

NAMES = ("model.safetensors", "pytorch_model.bin")  # names of a folder's weights; the first that exists is read
INDEX = ".index.json"
MAX_SHARD = "5GB"  # largest size of a written file; the default of transformers 5 is 50 GB


def write_model(model: Any, folder: Path, **options: Any) -> None:
    """Call `model.save_pretrained`: config, generation config, and safetensors in shards of MAX_SHARD with an index."""
    model.save_pretrained(folder, max_shard_size=MAX_SHARD, **options)
    split_convolutions(model, folder)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of a checkpoint by its name, on the CPU. Pickles are read with weights_only=True.

    Raises ModelError if there are no weights, if a file is missing or damaged, or if a pickle contains other objects.
    """
    weights: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        try:
            read = load_file(file) if file.suffix == ".safetensors" else unpickled(file)
        except (SafetensorError, OSError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            why = " ".join(str(error).split())[:200]
            raise ModelError(f"model {folder}: {file.name} cannot be read ({type(error).__name__}: {why})") from error
        if not isinstance(read, dict) or not all(
            isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in read.items()
        ):
            raise ModelError(f"model {folder}: {file.name} is not a table of tensors by name")
        weights |= read
    return weights


def wide_tensors(folder: Path) -> set[str]:
    """Return the names of a checkpoint's fp32 tensors if it has narrower ones beside them, from safetensors headers.

    A checkpoint of fp32 alone has none: there the config's dtype decides.
    """
    dtypes: dict[str, str] = {}
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt") as tensors:
                    dtypes |= {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
            except (SafetensorError, OSError):  # reported where the weights are read
                return set()
    return {name for name, dtype in dtypes.items() if dtype == "F32"} if {"BF16", "F16"} & {*dtypes.values()} else set()


def tensor_names(folder: Path) -> list[str]:
    """Return the names of a checkpoint's tensors, from safetensors headers; none of a pickle."""
    names: list[str] = []
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                names += tensors.keys()
    return names


def holds_weights(folder: Path) -> bool:
    """Check whether a folder holds a model's weights; other files of tensors, such as training_args.bin, are none."""
    return any((folder / f"{name}{end}").is_file() for name in NAMES for end in ("", INDEX))


def weight_files(folder: Path) -> list[Path]:
    """Return the files with a checkpoint's weights: of several, those that transformers takes.

    Raises ModelError if there are none, or if one is missing.
    """
    for name in NAMES:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / (name + INDEX)
        if index.is_file():
            return [folder / shard for shard in shards(index)]
    raise ModelError(f"model {folder}: no weights in this folder; expected {' or '.join(NAMES)}")


def shards(index: Path) -> list[str]:
    """Return the files that an index of shards names, in order.

    Raises ModelError if it is not an index, or if it names a file that is missing or outside its folder.
    """
    where = f"model {index.parent}: {index.name}"
    try:
        data: Any = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{where} is not JSON ({type(error).__name__})") from error
    named = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
        raise ModelError(f"{where} has no weight_map of tensor names to files")
    files = sorted(set(named.values()))
    for name in files:
        if Path(name).name != name or "\\" in name:
            raise ModelError(f"{where} names {name[:100]!r}, which is not a file of this folder; nothing is read")
        if not os.path.isfile(index.parent / name):  # Path.is_file raises for a name that is too long
            raise ModelError(f"{where} names {name[:100]!r}, which is missing")
    return files


def unpickled(file: Path) -> Any:
    """Load the tensors of a pickle, memory-mapped if possible. Raises what torch.load raises."""
    return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
