"""Bare mixtures of experts of nine families, from tiny configs: stock classes, random values."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from sspruner.testing.models import randomise

# model type -> its module, config class, class of the block
FAMILIES: dict[str, tuple[str, str, str]] = {
    "granitemoehybrid": ("granitemoehybrid", "GraniteMoeHybridConfig", "GraniteMoeHybridMoE"),
    "jamba": ("jamba", "JambaConfig", "JambaSparseMoeBlock"),
    "nemotron_h": ("nemotron_h", "NemotronHConfig", "NemotronHMoE"),
    "qwen3_next": ("qwen3_next", "Qwen3NextConfig", "Qwen3NextSparseMoeBlock"),
    "qwen3_5_moe": ("qwen3_5_moe", "Qwen3_5MoeTextConfig", "Qwen3_5MoeSparseMoeBlock"),
    "qwen4_exp": ("qwen4_exp", "Qwen4ExpTextConfig", "Qwen4ExpTextSparseMoeBlock"),
    "bailing_hybrid": ("bailing_hybrid", "BailingHybridConfig", "BailingHybridMoE"),
    "kimi_linear": ("kimi_linear", "KimiLinearConfig", "KimiLinearMoE"),
    "glm5_next": ("glm5_next", "Glm5NextTextConfig", "Glm5NextTextMoE"),
}


def block(family: str, *, seed: int = 0, top_k: int = 3, **overrides: Any) -> Any:
    """Build one mixture of experts in eval mode: 8 experts of 24 neurons; in bailing_hybrid 16 in 4 routing groups."""
    package, config_name, name = FAMILIES[family]
    home = f"transformers.models.{package}"
    config_class = getattr(importlib.import_module(f"{home}.configuration_{package}"), config_name)
    grouped = family == "bailing_hybrid"
    config = config_class()
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_experts_per_tok": top_k,
        "n_group": 4 if grouped else 1,
        "topk_group": 2 if grouped else 1,
        "moe_latent_size": 16,
        "moe_shared_expert_intermediate_size": 12,
        "shared_expert_intermediate_size": 12,
        "n_shared_experts": 2,
        "norm_topk_prob": True,
        "mlp_bias": True,
        "_experts_implementation": "grouped_mm",
        **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), 24),
        **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 16 if grouped else 8),
        **overrides,
    }
    for field, value in sizes.items():
        setattr(config, field, value)
    module: nn.Module = getattr(importlib.import_module(f"{home}.modeling_{package}"), name)(config)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        randomise(module)
    return module.eval()
