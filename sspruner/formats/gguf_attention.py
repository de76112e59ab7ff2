"""Attention in a GGUF file: fields and tensors of ordinary, gated and latent attention."""

from __future__ import annotations

from typing import Any

import torch

from sspruner.errors import ModelError
from sspruner.formats.gguf_blocks import GATED_DELTA, KDA, Block, Parts, one
from sspruner.formats.gguf_epsilon import Epsilons, epsilon_of
from sspruner.formats.gguf_weights import Named, Weights

Fields = dict[str, Any]


def attention_fields(model: Parts) -> Fields:
    """Return heads and rotation. A layer with 0 key/value heads has no attention."""
    if not hasattr(model.config, "num_attention_heads"):
        return {"attention.head_count": 0}
    if not model.attentions:
        raise ModelError("gguf: no attention layer is left, and llama.cpp reads this kind of model with some alone")
    if model.kind in KDA:
        return _latent_fields(model)
    dim = one("size of the attention heads", [a.head_dim for a in model.attentions])
    kv = [0 if b.attention is None else b.attention.k_proj.weight.shape[0] // dim for b in model.blocks]
    q = [0 if b.attention is None else b.attention.o_proj.weight.shape[1] // dim for b in model.blocks]
    found: Fields = {
        "attention.key_length": dim,
        "attention.value_length": dim,
        "rope.dimension_count": rotary_dim(model) or dim,
    }
    if model.kind in ("falcon_h1", "jamba", *GATED_DELTA):
        found["attention.head_count"] = one("number of attention heads", [n for n in q if n])
    else:  # an array has a number for every layer, and its first must not be 0
        most = max(q)
        found["attention.head_count"] = most if {*q} <= {0, most} else [n or most for n in q]
    alike = model.kind in ("falcon_h1", *GATED_DELTA)
    if model.kind in GATED_DELTA:  # another field says which layers have attention
        kv = [n for n in kv if n]
    found["attention.head_count_kv"] = one("number of key/value heads", kv) if alike else kv
    if model.architecture == "granitehybrid":
        found["attention.scale"] = float(model.attentions[0].scaling)
        found["rope.scaling.finetuned"] = model.rotary is not None  # its switch for the rotary embedding
    if model.rotary is not None:
        found["rope.freq_base"] = float(model.config.rope_parameters["rope_theta"])
    if model.kind.startswith("qwen3_5"):
        found["rope.dimension_sections"] = _sections(model)
    return found


def _latent_fields(model: Parts) -> Fields:
    """Return the fields of latent attention, to llama.cpp one key/value head: a narrow vector, rotated in part."""
    first = model.attentions[0]
    if getattr(first, "q_a_proj", None) is not None:
        raise ModelError(f"gguf: llama.cpp has queries from a narrow vector (q_lora_rank) in none of {model.kind}'s")
    found: Fields = {
        "attention.head_count": one("number of attention heads", [a.num_heads for a in model.attentions]),
        "attention.head_count_kv": [int(block.attention is not None) for block in model.blocks],
        "attention.kv_lora_rank": first.kv_lora_rank,
        "attention.key_length": first.kv_lora_rank + first.qk_rope_head_dim,
        "attention.value_length": first.kv_lora_rank,
        "attention.key_length_mla": first.qk_nope_head_dim + first.qk_rope_head_dim,
        "attention.value_length_mla": first.v_head_dim,
        "rope.dimension_count": first.qk_rope_head_dim,
    }
    if model.rotary is not None:
        found["rope.freq_base"] = float(model.config.rope_parameters["rope_theta"])
    return found


def _sections(model: Parts) -> list[int]:
    """Return how many rotated pairs take the position in time, height and width: in a text all three are one."""
    pairs, sections = rotary_dim(model) // 2, list(model.rotary.mrope_section)
    if sum(sections) != pairs or any(i >= 3 * sections[i % 3] for i in range(pairs)):
        sections = [len(range(axis, pairs, 3)) for axis in range(3)]
    return [*sections, 0]


def attention(model: Parts, block: Block, out: float, epsilons: Epsilons, weights: Weights) -> Named:
    """Yield the tensors of an attention module. out: factor of its output."""
    if model.kind in KDA:
        yield from _latent(block.attention, out, epsilons, weights)
    elif model.kind in GATED_DELTA:
        yield from _gated(block.attention, out, epsilons, weights)
    else:
        yield from _ordinary(model, block, out, weights)


def _ordinary(model: Parts, block: Block, out: float, weights: Weights) -> Named:
    module, layer = block.attention, block.layer
    read = getattr(layer, "attention_in_multiplier", 1.0)
    key = getattr(module, "key_multiplier", 1.0)
    rotated = rotary_dim(model) if model.architecture == "granitehybrid" else 0  # the others pair halves, or nothing
    for letter, factor in (("q", 1.0), ("k", key), ("v", 1.0)):
        for name, value in weights.linear(module, f"{letter}_proj", f"attn_{letter}", read * factor, factor):
            yield name, value if letter == "v" else _neighbours(value, module.head_dim, rotated)
    out = out * getattr(layer, "attn_out_multiplier", 1.0)
    bias = None if model.kind == "falcon_h1" else out  # llama.cpp loads its bias, and does not add it
    yield from weights.linear(module, "o_proj", "attn_output", out, bias)


def _gated(module: Any, out: float, epsilons: Epsilons, weights: Weights) -> Named:
    """Yield the tensors of gated attention, whose queries and keys are normalised. Biases have no place."""
    P, hidden = module.head_dim, module.q_proj.weight.shape[1]
    q = weights(module, "q_proj.weight").view(-1, 2, P, hidden)  # (heads, [query | gate], P, hidden)
    scale = q.new_tensor([epsilons.rows(epsilon_of(module.q_norm)), 1.0])
    yield "attn_q.weight", (q * scale[:, None, None]).view(-1, hidden)
    yield "attn_k.weight", weights(module, "k_proj.weight") * epsilons.rows(epsilon_of(module.k_norm))
    yield "attn_v.weight", weights(module, "v_proj.weight")
    for letter in "qk":
        yield f"attn_{letter}_norm.weight", weights.norm(getattr(module, f"{letter}_norm"))
    yield "attn_output.weight", weights(module, "o_proj.weight") * out


def _latent(module: Any, out: float, epsilons: Epsilons, weights: Weights) -> Named:
    """Yield the tensors of latent attention; keys and values are made from the narrow vector head by head."""
    rank, nope = module.kv_lora_rank, module.qk_nope_head_dim
    narrow = weights(module, "kv_a_proj_with_mqa.weight").clone()
    narrow[:rank] *= epsilons.rows(epsilon_of(module.kv_a_layernorm))
    made = weights(module, "kv_b_proj.weight").view(module.num_heads, -1, rank)  # (heads, [key | value], rank)
    yield "attn_q.weight", weights(module, "q_proj.weight")
    yield "attn_kv_a_mqa.weight", narrow
    yield "attn_kv_a_norm.weight", weights.norm(module.kv_a_layernorm)
    yield "attn_k_b.weight", made[:, :nope].transpose(1, 2)
    yield "attn_v_b.weight", made[:, nope:]
    if hasattr(module, "g_proj"):
        yield "attn_gate.weight", weights(module, "g_proj.weight")
    yield "attn_output.weight", weights(module, "o_proj.weight") * out


def rotary_dim(model: Parts) -> int:
    """Return the number of channels of a head that rotate, 0 without a rotary embedding."""
    return 0 if model.rotary is None else 2 * len(model.rotary.inv_freq)


def _neighbours(rows: torch.Tensor, head_dim: int, rotated: int) -> torch.Tensor:
    """Reorder the first `rotated` rows of each head, so that the two of each rotation are neighbours.

    transformers rotates channel i with i + rotated / 2, llama.cpp's NORM type 2i with 2i + 1.
    """
    if not rotated:
        return rows
    heads = rows.view(-1, head_dim, *rows.shape[1:])
    first = torch.unflatten(heads[:, :rotated], 1, (2, rotated // 2)).transpose(1, 2).flatten(1, 2)
    return torch.cat([first, heads[:, rotated:]], 1).view(rows.shape)
