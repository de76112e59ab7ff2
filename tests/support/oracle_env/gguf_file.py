"""Run by the interpreter of .venv-oracle: folders of stock transformers become GGUF files, and are read back.

gguf_file.py FOLDER...: FOLDER/model.gguf, by the package gguf: its names for the tensors of the architectures mamba and
mamba2, with the values in the forms that llama.cpp computes with (A as -exp(A_log), the convolution without its middle
dimension, gains of Mamba2's norm by group). Prints JSON: for each folder the fields and the shapes that were read.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

ARCHITECTURES = {"MambaForCausalLM": gguf.MODEL_ARCH.MAMBA, "Mamba2ForCausalLM": gguf.MODEL_ARCH.MAMBA2}
T = gguf.MODEL_TENSOR


def names(arch: Any, blocks: int) -> dict[str, Any]:
    """Return GGUF's name -> tensor of the architecture, for the global tensors and those of each block."""
    found = {}
    for kind in gguf.MODEL_TENSORS[arch]:
        for block in range(blocks):
            found[gguf.TENSOR_NAMES[kind].format(bid=block)] = kind
    return found


def converted(config: dict[str, Any], arch: Any, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return every tensor under GGUF's name and in its form. Raises KeyError for one that the architecture lacks."""
    blocks = config["num_hidden_layers"]
    known, of = gguf.get_tensor_name_map(arch, blocks), names(arch, blocks)
    found: dict[str, np.ndarray] = {}
    for name, value in weights.items():
        theirs = known.get_name(name.replace(".dt_bias", ".dt_proj.bias"), try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise KeyError(f"gguf has no name for {name} in {arch.name}")
        kind = of[theirs.removesuffix(".weight").removesuffix(".bias")]
        value = -np.exp(value) if kind == T.SSM_A else value
        if kind == T.SSM_CONV1D:
            value = value.squeeze(1) if value.ndim == 3 else value
        elif arch == gguf.MODEL_ARCH.MAMBA2 and kind in (T.SSM_A, T.SSM_D):
            value = value[:, None]
        elif kind == T.SSM_NORM:
            value = value.reshape(config["n_groups"], -1)
        assert theirs not in found, theirs
        found[theirs] = np.ascontiguousarray(value)
    return found


def write(folder: Path) -> Path:
    config = json.loads((folder / "config.json").read_text())
    arch = ARCHITECTURES[config["architectures"][0]]
    mamba1 = arch == gguf.MODEL_ARCH.MAMBA
    inner = config["intermediate_size"] if mamba1 else config["num_heads"] * config["head_dim"]
    out = gguf.GGUFWriter(folder / "model.gguf", gguf.MODEL_ARCH_NAMES[arch])
    out.add_context_length(2**20)
    out.add_embedding_length(config["hidden_size"])
    out.add_block_count(config["num_hidden_layers"])
    out.add_feed_forward_length(0)
    out.add_head_count(0)
    out.add_layer_norm_rms_eps(config["layer_norm_epsilon"])
    out.add_vocab_size(config["vocab_size"])
    out.add_ssm_conv_kernel(config["conv_kernel"])
    out.add_ssm_inner_size(inner)
    out.add_ssm_state_size(config["state_size"])
    out.add_ssm_time_step_rank(config["time_step_rank"] if mamba1 else config["num_heads"])
    if not mamba1:
        out.add_ssm_group_count(config["n_groups"])
    for name, value in converted(config, arch, load_file(folder / "model.safetensors")).items():
        out.add_tensor(name, value)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return folder / "model.gguf"


def read(file: Path) -> dict[str, Any]:
    """Fields and tensors' shapes, as llama.cpp has them: the fastest dimension first."""
    found = gguf.GGUFReader(file)
    arch = found.fields["general.architecture"].contents()
    values = {name: field.contents() for name, field in found.fields.items() if name.startswith(f"{arch}.")}
    sums = {t.name: float(np.asarray(t.data, dtype=np.float64).sum()) for t in found.tensors}
    return {
        "architecture": arch,
        "fields": {name.removeprefix(f"{arch}."): value for name, value in values.items()},
        "shapes": {t.name: [int(n) for n in t.shape] for t in found.tensors},
        "sums": sums,
    }


if __name__ == "__main__":
    print(json.dumps([read(write(Path(folder))) for folder in sys.argv[1:]]))
