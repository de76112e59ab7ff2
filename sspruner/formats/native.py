"""Checkpoints of the package mamba_ssm: read as transformers' Mamba2 or Mamba, and written for its own loader.

config.json is a `MambaConfig` of mamba_ssm 2.x (d_model, n_layer, ssm_cfg, ...). Tensors have transformers' names,
except for the embedding. The package itself is not needed.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch

from sspruner.errors import ModelError
from sspruner.formats.checkpoint import read_weights

EMBEDDING = {"backbone.embedding.weight": "backbone.embeddings.weight"}  # mamba_ssm's name -> transformers'
EPSILON = 1e-5  # epsilon of every norm: mamba_ssm has no field for it
LARGEST = 3.4028234663852886e38  # of fp32: stands for "no upper limit", since JSON has no infinity

MODEL: dict[str, Any] = {  # fields of mamba_ssm's config with their defaults
    "d_model": 2560, "d_intermediate": 0, "n_layer": 64, "vocab_size": 50277, "ssm_cfg": {}, "attn_layer_idx": [],
    "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8,
    "tie_embeddings": True,
}  # fmt: skip
MAMBA1: dict[str, Any] = {"d_state": 16, "d_conv": 4, "expand": 2, "dt_rank": "auto", "conv_bias": True, "bias": False}
MAMBA2: dict[str, Any] = {
    "d_state": 128, "d_conv": 4, "expand": 2, "headdim": 64, "d_ssm": None, "ngroups": 1, "D_has_hdim": False,
    "rmsnorm": True, "norm_before_gate": False, "dt_limit": (0.0, math.inf), "bias": False, "conv_bias": True,
    "chunk_size": 256,
}  # fmt: skip
NO_MATTER = {  # fields that affect only initialisation, or how the same numbers are computed
    "A_init_range", "conv_init", "dt_init", "dt_init_floor", "dt_max", "dt_min", "dt_scale", "layer",
    "sequence_parallel", "use_fast_path", "use_mem_eff_path",
}  # fmt: skip


def is_native(config: dict[str, Any]) -> bool:
    """Return whether this config.json is of mamba_ssm."""
    return "model_type" not in config and "d_model" in config and "n_layer" in config


def read_native(folder: Path, config: dict[str, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    """Read a native checkpoint. Returns transformers' config, and weights under transformers' names.

    The vocabulary is as large as the embedding, padding included. Raises ModelError for variants that transformers'
    modules do not compute (attention, MLPs, a scan on a part of the channels, other norms), and for weights that do not
    fit.
    """
    weights = {EMBEDDING.get(name, name): tensor for name, tensor in read_weights(folder).items()}
    embedding = weights.get(EMBEDDING["backbone.embedding.weight"])
    if embedding is None or embedding.ndim != 2:
        raise ModelError(f"model {folder}: its weights lack backbone.embedding.weight")
    hf_config = native_config(config, f"model {folder}")
    padded = hf_config.vocab_size
    if len(embedding) != padded:
        raise ModelError(
            f"model {folder}: its embedding has {len(embedding)} rows; a vocabulary of {config.get('vocab_size')} is "
            f"padded to {padded}"
        )
    hf_config.dtype = embedding.dtype
    if hf_config.tie_word_embeddings:
        head = weights.pop("lm_head.weight", embedding)
        if not torch.equal(head, embedding):
            raise ModelError(f"model {folder}: lm_head is tied to the embedding, but its weights are others")
    return hf_config, weights


def native_config(config: dict[str, Any], where: str) -> Any:
    """Convert a `MambaConfig` in JSON to transformers' config. Raises ModelError, prefixed by `where`."""
    from transformers import Mamba2Config, MambaConfig

    fields = MODEL | config
    mixer = fields["ssm_cfg"] or {}
    if not isinstance(mixer, dict):
        raise ModelError(f"{where}: ssm_cfg is not a table")
    layer = mixer.get("layer", "Mamba1")
    if layer not in ("Mamba1", "Mamba2"):
        raise ModelError(f"{where}: ssm_cfg.layer is {layer!r}; known: Mamba1, Mamba2")
    known = MAMBA2 if layer == "Mamba2" else MAMBA1
    for name in (*(set(config) - set(MODEL)), *(f"ssm_cfg.{n}" for n in set(mixer) - set(known) - NO_MATTER)):
        raise ModelError(f"{where}: {name} is not a field of mamba_ssm {layer} that sspruner knows")
    m = known | mixer
    try:
        if not isinstance(m["expand"], int | float):
            raise ValueError(f"expand is {m['expand']!r}, not a number")
        inner = int(m["expand"] * _whole(fields["d_model"]))
        _refuse_variants(fields, m, inner, where)
        common = {
            "hidden_size": _whole(fields["d_model"]),
            "num_hidden_layers": _whole(fields["n_layer"]),
            "vocab_size": _padded(_whole(fields["vocab_size"]), _whole(fields["pad_vocab_size_multiple"])),
            "state_size": _whole(m["d_state"]),
            "conv_kernel": _whole(m["d_conv"]),
            "expand": m["expand"],
            "use_bias": bool(m["bias"]),
            "use_conv_bias": bool(m["conv_bias"]),
            "layer_norm_epsilon": EPSILON,
            "residual_in_fp32": bool(fields["residual_in_fp32"]),
            "tie_word_embeddings": bool(fields["tie_embeddings"]),
            # The tokenizer defines these ids; the library's defaults belong to other models.
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
        }  # fmt: skip
        if layer == "Mamba1":
            rank = math.ceil(fields["d_model"] / 16) if m["dt_rank"] == "auto" else _whole(m["dt_rank"])
            return MambaConfig(**common, time_step_rank=rank)
        return Mamba2Config(
            **common,
            num_heads=inner // _whole(m["headdim"]),
            head_dim=m["headdim"],
            n_groups=_whole(m["ngroups"]),
            chunk_size=_whole(m["chunk_size"]),
            time_step_limit=tuple(float(limit) for limit in m["dt_limit"]),
        )
    except Exception as error:  # transformers' configs raise errors of their own, too
        raise ModelError(f"{where}: config.json: {' '.join(str(error).split())[:200]}") from error


def _refuse_variants(fields: dict[str, Any], m: dict[str, Any], inner: int, where: str) -> None:
    """Raise ModelError for variants that transformers' modules do not compute."""
    variants = {
        "attention layers (attn_layer_idx)": fields["attn_layer_idx"],
        "MLPs between the mixers (d_intermediate)": fields["d_intermediate"],
        "LayerNorm (rms_norm false)": not fields["rms_norm"],
        f"a scan on {m.get('d_ssm')} of {inner} channels (d_ssm)": m.get("d_ssm") not in (None, inner),
        "a D for every channel (D_has_hdim)": m.get("D_has_hdim"),
        "mixers without a norm (rmsnorm false)": not m.get("rmsnorm", True),
        "norm_before_gate": m.get("norm_before_gate"),
    }
    for name in (name for name, present in variants.items() if present):
        raise ModelError(
            f"{where}: it has {name}, which transformers' classes do not compute; load it with mamba_ssm, and cut it "
            "in Python (docs/families.md)"
        )


def write_native(model: Any, folder: Path) -> None:
    """Write `config.json`, `generation_config.json` and the single weights file that mamba_ssm's loader reads.

    model: a stock Mamba2 or Mamba of transformers, see `native_fields`. Shared weights are stored once.
    """
    fields = native_fields(model)
    names = {theirs: name for name, theirs in EMBEDDING.items()}
    weights = {names.get(name, name): tensor for name, tensor in model.state_dict().items()}
    try:
        torch.save(weights, folder / "pytorch_model.bin")
    except RuntimeError as error:  # raised for a full disk
        raise OSError(f"pytorch_model.bin: {error}") from error
    (folder / "config.json").write_text(json.dumps(fields, indent=4, allow_nan=False) + "\n", encoding="utf-8")
    model.generation_config.save_pretrained(folder)  # read by `sspruner.load`, not by mamba_ssm


def native_fields(model: Any) -> dict[str, Any]:
    """Return the `MambaConfig` of a stock transformers model. Raises ModelError if there is none."""
    c = model.config
    if c.model_type not in ("mamba", "mamba2"):
        raise ModelError(f"mamba-ssm has no model of type {c.model_type!r}: only mamba and mamba2")
    if c.layer_norm_epsilon != EPSILON or c.hidden_act != "silu":
        raise ModelError(
            f"mamba-ssm fixes its norms' epsilon at {EPSILON} and its activation as silu; here they are "
            f"{c.layer_norm_epsilon} and {c.hidden_act}"
        )
    m = {"d_state": c.state_size, "d_conv": c.conv_kernel, "conv_bias": c.use_conv_bias, "bias": c.use_bias}
    inner = c.intermediate_size if c.model_type == "mamba" else c.num_heads * c.head_dim
    if inner % c.hidden_size:  # mamba_ssm's caches have d_model * expand channels, so expand must be an integer
        raise ModelError(f"mamba-ssm wants a multiple of the hidden size {c.hidden_size} as channels; here are {inner}")
    m["expand"] = inner // c.hidden_size
    if c.model_type == "mamba":
        m |= {"layer": "Mamba1", "dt_rank": int(c.time_step_rank)}
    else:
        m |= {"layer": "Mamba2", "headdim": c.head_dim, "ngroups": c.n_groups, "chunk_size": c.chunk_size}
        if tuple(c.time_step_limit) != MAMBA2["dt_limit"]:
            m["dt_limit"] = [min(limit, LARGEST) for limit in c.time_step_limit]
    return copy.deepcopy(MODEL) | {
        "d_model": c.hidden_size,
        "n_layer": c.num_hidden_layers,
        "vocab_size": c.vocab_size,
        "ssm_cfg": m,
        "residual_in_fp32": c.residual_in_fp32,
        "pad_vocab_size_multiple": math.gcd(c.vocab_size, 8),
        "tie_embeddings": c.tie_word_embeddings,
    }


def _padded(vocabulary: int, multiple: int) -> int:
    return -(-vocabulary // multiple) * multiple


def _whole(value: Any) -> int:
    if type(value) is not int or value <= 0:
        raise ValueError(f"{value!r} where a whole number above 0 is expected")
    return value
