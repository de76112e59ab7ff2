"""Tiny random Hugging Face models of every state-space family, for conformance checks and the engine's tests.

`zoo("zamba2", groups=1, use_mem_rope=False)` builds one. The names in SHAPE mean the same in every family that has the
feature, and are ignored in others; any other name goes to the family's config. The defaults are the richest model that
a family allows: biases, two B/C groups, adapters, experts, multipliers other than 1. `zoo_models()` in structures.py
draws the family and the structure. `sspruner doctor` runs on these models: this file must not need hypothesis or
pytest.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

VOCABULARY = 31

SHAPE: dict[str, Any] = {
    "layers": "MMAM",  # M Mamba, A attention (together with Mamba in zamba, zamba2, falcon_h1), - MLP, E experts
    "groups": 2,  # of B and C, Mamba2
    "heads": 2,  # per group; Mamba2, and zamba, which has no groups
    "channels": 4,  # per head, so that D = groups·heads·channels
    "hidden": 8,  # Mamba1, where D = 2·hidden
    "state": 6,
    "rank": 3,  # of dt, Mamba1
    "bias": True,  # of every Linear that has an option for it
    "conv_bias": True,  # zamba2 has no option: always
    "kv": 2,  # heads of k and v
    "ratio": 2,  # heads of q per head of k and v
    "adapters": True,  # zamba2
    "experts": 3,  # granitemoehybrid (0: none), jamba (1: none)
}
# Values that differ from SHAPE, by family. Experts run through grouped_mm, which needs rows of a multiple of 16 bytes:
# hidden sizes and expert widths are multiples of 8 there, for bf16.
SHAPES: dict[str, dict[str, Any]] = {
    "mamba2": {"layers": "MMM"},
    "mamba": {"layers": "MMM"},
    "falcon_mamba": {"layers": "MMM"},
    "zamba2": {"layers": "MAMAA", "ratio": 1},  # two blocks: the third hybrid layer shares the first one's
    "bamba": {},
    "granitemoehybrid": {"channels": 16},
    "falcon_h1": {"layers": "AAA"},
    "nemotron_h": {"layers": "M-AME"},
    "jamba": {},
    "zamba": {"layers": "MAMA", "channels": 8, "ratio": 1},
    "qwen3_next": {"experts": 0},
    "qwen3_5_text": {},
    "qwen3_5_moe_text": {},
    "qwen4_exp_text": {},
    "olmo_hybrid": {},
    "lara_mini": {},
    "kimi_linear": {"channels": 6},
    "bailing_hybrid": {"channels": 6},
    "glm5_next_text": {"channels": 6},
}
FAMILIES = tuple(name for name in SHAPES if name in CONFIG_MAPPING)  # those that the installed transformers has
TYPES = {"M": "linear_attention", "A": "full_attention", "-": "mlp", "E": "moe"}


def _attention(s: SimpleNamespace) -> dict[str, Any]:
    return {"num_attention_heads": s.kv * s.ratio, "num_key_value_heads": s.kv, "head_dim": 4}


def _mamba2(s: SimpleNamespace) -> dict[str, Any]:
    return {
        "hidden_size": s.groups * s.heads * s.channels // 2,
        "n_groups": s.groups,
        "num_heads": s.groups * s.heads,
        "head_dim": s.channels,
        "state_size": s.state,
        "chunk_size": 8,
        "use_bias": s.bias,
        "use_conv_bias": s.conv_bias,
    }


def _mamba(s: SimpleNamespace) -> dict[str, Any]:
    return {
        "hidden_size": s.hidden,
        "state_size": s.state,
        "time_step_rank": s.rank,
        "use_bias": s.bias,
        "use_conv_bias": s.conv_bias,
    }


def _zamba2(s: SimpleNamespace) -> dict[str, Any]:
    """Return config fields of zamba2.

    Attention sees [hidden, embedding], D channels: groups·heads of `channels`. With ratio > 1 there is one head of k
    and v and no adapters, since adapters of k and v have the width of q's.
    """
    return {
        "layers_block_type": ["hybrid" if letter == "A" else TYPES[letter] for letter in s.layers],
        "hidden_size": s.groups * s.heads * s.channels // 2,
        "mamba_ngroups": s.groups,
        "n_mamba_heads": s.groups * s.heads,
        "mamba_d_state": s.state,
        "chunk_size": 8,
        "add_bias_linear": s.bias,
        "intermediate_size": 10,
        "num_attention_heads": s.groups * s.heads,
        "num_key_value_heads": s.groups * s.heads if s.ratio == 1 else 1,
        "use_shared_attention_adapter": s.adapters and s.ratio == 1,
        "adapter_rank": 3,
        "num_mem_blocks": 2,
        "use_mem_rope": True,
        "tie_word_embeddings": True,  # stock shares the blocks only if it ties the embeddings
    }


def _bamba(s: SimpleNamespace) -> dict[str, Any]:
    return {
        "attn_layer_indices": [i for i, letter in enumerate(s.layers) if letter == "A"],
        "hidden_size": s.groups * s.heads * s.channels // 2,
        "mamba_n_groups": s.groups,
        "mamba_n_heads": s.groups * s.heads,
        "mamba_d_head": s.channels,
        "mamba_d_state": s.state,
        "mamba_chunk_size": 8,
        "mamba_proj_bias": s.bias,
        "mamba_conv_bias": s.conv_bias,
        "intermediate_size": 10,
        "mlp_bias": s.bias,
        **_attention(s),
        "attention_bias": s.bias,
    }


def _granitemoehybrid(s: SimpleNamespace) -> dict[str, Any]:
    """Return config fields of granitemoehybrid: bamba with experts and a shared MLP in every layer."""
    return _bamba(s) | {
        "layer_types": [TYPES[letter] for letter in s.layers],
        "intermediate_size": 16,
        "shared_intermediate_size": 10,
        "num_local_experts": s.experts,
        "num_experts_per_tok": 2,
        "position_embedding_type": "rope",
        "embedding_multiplier": 1.5,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.8,
        "logits_scaling": 0.7,
    }


def _falcon_h1(s: SimpleNamespace) -> dict[str, Any]:
    """Return config fields of falcon_h1: Mamba and attention side by side; D and the hidden size are independent."""
    return _bamba(s) | {
        "hidden_size": 12,
        "mamba_d_ssm": s.groups * s.heads * s.channels,
        "mamba_rms_norm": True,
        "projectors_bias": s.bias,
        "ssm_multipliers": [0.7, 1.3, 0.8, 1.2, 0.6],  # z, x, B, C, dt
        "ssm_in_multiplier": 1.2,
        "ssm_out_multiplier": 0.9,
        "attention_in_multiplier": 0.8,
        "attention_out_multiplier": 1.1,
        "key_multiplier": 0.7,
        "mlp_multipliers": [1.2, 0.8],
        "embedding_multiplier": 1.5,
        "lm_head_multiplier": 0.7,
    }


def _nemotron_h(s: SimpleNamespace) -> dict[str, Any]:
    """Return config fields of nemotron_h: one module per layer; D and the hidden size are independent; no rope."""
    return {
        "layers_block_type": [TYPES[letter] for letter in s.layers],
        "hidden_size": 24,
        "n_groups": s.groups,
        "mamba_num_heads": s.groups * s.heads,
        "mamba_head_dim": s.channels,
        "ssm_state_size": s.state,
        "chunk_size": 8,
        "use_bias": s.bias,
        "use_conv_bias": s.conv_bias,
        "intermediate_size": 10,
        "mlp_bias": s.bias,
        **_attention(s),
        "n_routed_experts": 6,
        "n_group": 2,  # a token takes 2 of the 3 experts in the better one
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 7,
        "moe_latent_size": 16,
        "routed_scaling_factor": 1.5,
    }


def _jamba(s: SimpleNamespace) -> dict[str, Any]:
    """Return config fields of jamba: one attention layer, as layer types are periodic; experts in every second MLP."""
    return {
        "attn_layer_period": len(s.layers),
        "attn_layer_offset": s.layers.index("A"),
        "hidden_size": s.hidden,
        "mamba_d_state": s.state,
        "mamba_dt_rank": s.rank,
        "mamba_proj_bias": s.bias,
        "mamba_conv_bias": s.conv_bias,
        "intermediate_size": 16,
        **_attention(s),
        "num_experts": s.experts,
        "num_experts_per_tok": 2,
    }


def _zamba(s: SimpleNamespace) -> dict[str, Any]:
    """Return config fields of zamba: `heads` independent Mamba1 heads, 2·hidden = heads·channels; one shared block."""
    return {
        "layers_block_type": ["hybrid" if letter == "A" else TYPES[letter] for letter in s.layers],
        "hidden_size": s.heads * s.channels // 2,
        "n_mamba_heads": s.heads,
        "mamba_d_state": s.state,
        "mamba_dt_rank": s.rank,
        "mamba_proj_bias": s.bias,
        "mamba_conv_bias": s.conv_bias,
        "intermediate_size": 10,
        "num_attention_heads": s.kv * s.ratio,
        "num_key_value_heads": s.kv,
        "attention_head_dim": 4,
        "tie_word_embeddings": True,  # as in zamba2
    }


def _delta_net(s: SimpleNamespace) -> dict[str, Any]:
    """Return config fields of gated delta nets: `groups` key heads of `state` channels, `heads` value heads of each."""
    return {
        "layer_types": [TYPES[letter] for letter in s.layers],
        "hidden_size": 24,
        "intermediate_size": 10,
        "linear_num_key_heads": s.groups,
        "linear_num_value_heads": s.groups * s.heads,
        "linear_key_head_dim": s.state,
        "linear_value_head_dim": s.channels,
        **_attention(s),
        "attention_bias": s.bias,
    }


def _qwen3_5_text(s: SimpleNamespace) -> dict[str, Any]:
    """Return config fields of qwen3_5_text: half of a head's channels are rotated."""
    rotation = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}
    return _delta_net(s) | {"rope_parameters": rotation}


def _qwen3_5_moe_text(s: SimpleNamespace) -> dict[str, Any]:
    """Return config fields of qwen3_5_moe_text: experts and a shared expert with a gate in every layer."""
    experts = {"num_experts": s.experts, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return _qwen3_5_text(s) | experts | {"shared_expert_intermediate_size": 10}


def _qwen3_next(s: SimpleNamespace) -> dict[str, Any]:
    """Return config fields of qwen3_next: qwen3_5_text with interleaved rows, and experts if there are any."""
    return _qwen3_5_moe_text(s)


def _qwen4_exp_text(s: SimpleNamespace) -> dict[str, Any]:
    """Return config fields of qwen4_exp_text: two copies of the residual stream, indexed attention, sigmoid gates."""
    return _qwen3_5_moe_text(s) | {
        "layer_types": ["indexed_attention" if letter == "A" else TYPES[letter] for letter in s.layers],
        "output_gate_type": "sigmoid",
        "hc_count": 2,
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 4,
        "indexer_budget": 64,
        "indexer_compress_ratio": 2,
    }


def _olmo_hybrid(s: SimpleNamespace) -> dict[str, Any]:
    """Return config fields of olmo_hybrid: norms of queries and keys average over all heads."""
    return _delta_net(s)


def _lara_mini(s: SimpleNamespace) -> dict[str, Any]:
    """Return config fields of lara_mini: qwen3_5_moe_text, whose shared expert has no gate; attention has a window."""
    kinds = TYPES | {"A": "sliding_attention"}
    sizes = _qwen3_5_moe_text(s)
    del sizes["rope_parameters"], sizes["intermediate_size"]
    return sizes | {"layer_types": [kinds[letter] for letter in s.layers], "sliding_window": 64}


def _kda(s: SimpleNamespace) -> dict[str, Any]:
    """Return config fields of the families with KDA: latent attention, a dense MLP in the first layer, then experts."""
    return {
        "layer_types": [TYPES[letter] for letter in s.layers],
        "mlp_layer_types": ["dense" if i == 0 or not s.experts else "sparse" for i in range(len(s.layers))],
        "hidden_size": 16,
        "linear_num_heads": s.heads,
        "linear_head_dim": s.channels,
        "num_attention_heads": s.kv * s.ratio,
        "num_key_value_heads": s.kv * s.ratio,
        "attention_bias": s.bias,
        "kv_lora_rank": 6,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 2,
        "v_head_dim": 3,
        "intermediate_size": 10,
        "num_local_experts": s.experts or 3,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "n_shared_experts": 1,
    }


def _kimi_linear(s: SimpleNamespace) -> dict[str, Any]:
    return _kda(s) | {"q_lora_rank": 5}


def _bailing_hybrid(s: SimpleNamespace) -> dict[str, Any]:
    """Return config fields of bailing_hybrid: a token takes 2 of the experts in the better one of two groups."""
    return _kda(s) | {"num_local_experts": 2 * (s.experts or 3), "n_group": 2}


def _glm5_next_text(s: SimpleNamespace) -> dict[str, Any]:
    """Return config fields of glm5_next_text: two residual streams; attention chooses pools of 4 tokens."""
    return _kda(s) | {
        "q_lora_rank": 5,
        "qk_rope_head_dim": 0,
        "index_topk": 64,
        "index_kpool": 4,
        "index_head_dim": 4,
        "index_n_heads": 2,
        "hc_mult": 2,
    }


# The vision part of glm5_next, which has no class without one.
_VISION = {
    "depth": 1,
    "hidden_size": 8,
    "num_heads": 2,
    "image_size": 8,
    "patch_size": 2,
    "out_hidden_size": 16,
    "intermediate_size": 8,
    "projection_intermediate_size": 8,
}


def zoo(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """Build a random model in eval mode.

    Token 0 is the padding, BOS and EOS token. Embeddings are tied in zamba and zamba2 only.
    """
    shape = SHAPE | SHAPES[family] | {name: value for name, value in overrides.items() if name in SHAPE}
    build = _mamba if family == "falcon_mamba" else globals()[f"_{family}"]
    config = {"vocab_size": VOCABULARY, "tie_word_embeddings": False, "num_hidden_layers": len(shape["layers"])}
    config |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    config |= build(SimpleNamespace(**shape)) | {n: value for n, value in overrides.items() if n not in SHAPE}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if family == "glm5_next_text":
            parts = {
                "text_config": config,
                "vision_config": _VISION,
                "tie_word_embeddings": config["tie_word_embeddings"],
            }
            ends = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
            made = AutoConfig.for_model("glm5_next", **parts, **ends)
            model = AutoModelForImageTextToText.from_config(made, dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config), dtype=dtype)
        for name, tensor in model.state_dict(keep_vars=True).items():  # as from_pretrained leaves them
            if any(part in name for part in model._keep_in_fp32_modules_strict or ()):
                tensor.data = tensor.data.float()
        randomise(model)
    return model.eval()


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Fill every parameter with random values, shared ones once: no 0 or 1 hides a fault, and activations stay O(1)."""
    buffers = [(n, b) for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")]  # nemotron_h
    for name, parameter in [*model.named_parameters(), *buffers]:
        if name.endswith(("A_log", "bias")):
            value = torch.randn(parameter.shape) * 0.7
            value -= 3 * name.endswith("forget_gate.dt_bias")  # a gate of KDA that is half open forgets all at once
        elif parameter.ndim == 1 or name.endswith(".D"):  # D is (heads, channels) in zamba
            value = torch.rand(parameter.shape) + 0.5
        else:  # (..., fan-in): Linear, embedding, depthwise conv (C, 1, kernel), experts, zamba's per-head projections
            value = torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5
        parameter.copy_(value)


@torch.no_grad()
def rounding(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Return the effect of one fp32 rounding of the embeddings on the logits, relative to the largest logit.

    About 1e-6, but 1e-3 in an unlucky model whose norms divide by very small numbers. The noise is added after the
    embedding, since falcon_h1 does not scale `inputs_embeds` as it scales embeddings.
    """
    noise = torch.randn(model.get_input_embeddings().weight.shape[1], generator=torch.Generator().manual_seed(0))
    clean = model(input_ids=ids, use_cache=False).logits
    hook = model.get_input_embeddings().register_forward_hook(lambda _module, _ids, out: out * (1 + 2.0**-22 * noise))
    try:
        return float((model(input_ids=ids, use_cache=False).logits - clean).abs().max() / clean.abs().max())
    finally:
        hook.remove()
