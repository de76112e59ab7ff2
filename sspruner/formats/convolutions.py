"""Convolutions of delta rules in a checkpoint: one tensor each for q, k and v, in the sizes of q, k and v.

transformers keeps one convolution for all three and splits it into equal parts when it saves, whatever their sizes
(`Concatenate` reversed, conversion_mapping.py of 5.23). It reads its own files rightly, since it joins them again;
other runtimes read the parts.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sspruner.graph.site import Site
from sspruner.graph.trace import trace

PARTS = ("q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight")
WHOLE = "conv1d.weight"


def split_convolutions(model: Any, folder: Path) -> None:
    """Split the convolutions in a folder that `model` was saved to where its q, k and v begin."""
    files = {name: file for file in sorted(folder.glob("*.safetensors")) for name in _names(file)}
    owners = sorted({name.removesuffix(PARTS[0]) for name in files if name.endswith(PARTS[0])})
    if not owners:
        return
    sites = trace(model).layers
    changed: dict[Path, dict[str, torch.Tensor]] = defaultdict(dict)
    for owner in owners:
        names = [owner + part for part in PARTS]
        parts = [_read(files[name], name) for name in names]
        sizes = _sizes(next(site for site in sites if _layer(site.path) == _layer(owner)))
        if [len(part) for part in parts] != sizes:
            for name, part in zip(names, torch.split(torch.cat(parts), sizes), strict=True):
                changed[files[name]][name] = part.contiguous()
    for file, tensors in changed.items():
        new = file.with_suffix(".new")  # the tensors that are read are views of the old file
        save_file(load_file(file) | tensors, new, metadata={"format": "pt"})
        new.replace(file)


def _layer(path: str) -> str:
    """Return the number of a layer from a path in it, whose other parts may have other names on disk (Bailing's)."""
    return path.partition("layers.")[2].partition(".")[0]


def _sizes(site: Site) -> list[int]:
    """Return the number of channels of q, k and v."""
    slot = next(slot for slot in site.layout.slots if slot.tensor == WHOLE)
    return [site.layout.count(rows.dims) for rows in slot.rows]


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def _read(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as tensors:
        value: torch.Tensor = tensors.get_tensor(name)
        return value
