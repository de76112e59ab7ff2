"""Variants of the zoo's models, their caches, and the tensors that share memory."""

from __future__ import annotations

import inspect

import torch
from transformers import PreTrainedModel

from support.zoo import FAMILIES

PURE = ("mamba2", "mamba", "falcon_mamba")


VARIANTS = [(family, {}) for family in FAMILIES] + [
    ("mamba2", {"groups": 1, "bias": False, "conv_bias": False}),
    ("zamba2", {"adapters": False, "use_mem_rope": False, "num_mem_blocks": 1}),
    ("zamba2", {"ratio": 2, "tie_word_embeddings": False}),
    ("granitemoehybrid", {"experts": 0, "position_embedding_type": None}),
    ("falcon_h1", {"mamba_rms_norm": False}),
    ("falcon_h1", {"mamba_norm_before_gate": False, "tie_word_embeddings": True}),
    ("nemotron_h", {"layers": "EMA-M", "moe_latent_size": None}),
    ("jamba", {"experts": 1, "layers": "AMM"}),
    ("zamba", {"heads": 1}),
]


def cache_name(model: PreTrainedModel) -> str:
    """Return the name under which the installed class takes its cache: `cache` since transformers 5.24."""
    if "cache" in inspect.signature(model.forward).parameters:
        return "cache"
    return "cache_params" if model.config.model_type in PURE else "past_key_values"


def cached(model: PreTrainedModel, ids: torch.Tensor, chunks: list[int], positions: bool = True) -> torch.Tensor:
    """Return the logits of `ids`, fed in chunks through a cache; models with attention also get positions."""
    name, cache, logits = cache_name(model), {}, []
    for chunk, position in zip(ids.split(chunks, 1), torch.arange(ids.shape[1]).split(chunks), strict=True):
        told = {"position_ids": position.expand_as(chunk)} if positions and model.config.model_type not in PURE else {}
        out = model(input_ids=chunk, use_cache=True, **cache, **told)
        cache = {name: out[name]}
        logits.append(out.logits.float())
    return torch.cat(logits, 1)


def sharing(model: PreTrainedModel) -> set[frozenset[str]]:
    """Return the groups of names that are one Parameter."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}
