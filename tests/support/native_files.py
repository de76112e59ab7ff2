"""Checkpoints as mamba_ssm writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from support.native import MambaLMHeadModel

FILES = ("pytorch_model.bin", "model.safetensors", "shards")


MIXERS: list[dict[str, Any]] = [
    {"layer": "Mamba2", "d_state": 6, "headdim": 4, "ngroups": 2, "chunk_size": 8},
    {
        "layer": "Mamba2",
        "d_state": 5,
        "headdim": 8,
        "bias": True,
        "conv_bias": False,
        "dt_limit": (0.2, 1.5),
        "d_ssm": 16,
    },
    {"layer": "Mamba1", "d_state": 6, "dt_rank": 3},
    {"layer": "Mamba1", "d_state": 4, "dt_rank": 1, "bias": True, "conv_bias": False, "d_conv": 3},
]


def write(model: MambaLMHeadModel, folder: Path, file: str = FILES[0]) -> Path:
    """Write a checkpoint as mamba_ssm's save_pretrained does, or with its tensors in other files."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model.config.__dict__))
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    if file == "shards":
        parts = {f"model-0000{i}-of-00002.safetensors": dict(list(tensors.items())[i::2]) for i in range(2)}
        for name, part in parts.items():
            save_file(part, folder / name)
        index = {"weight_map": {tensor: name for name, part in parts.items() for tensor in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif file.endswith(".bin"):
        torch.save(tensors, folder / file)
    else:
        save_file(tensors, folder / file)
    return folder
