"""Plugin of vLLM (entry point vllm.general_plugins): serve Mamba2 models with a projected state.

vLLM calls `register` in each of its processes. Nothing else imports this file. docs/serving.md says how to serve.
"""

from __future__ import annotations

MODEL_TYPE, ARCHITECTURE = "pruned_mamba2", "PrunedMamba2ForCausalLM"  # as `export --to hf-remote` writes them


def register() -> None:
    """Make the projected Mamba2 known to vLLM, and its config to transformers, so that no remote code is trusted."""
    from transformers import AutoConfig, Mamba2Config
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, MambaModelConfig

    config = type("PrunedMamba2Config", (Mamba2Config,), {"model_type": MODEL_TYPE})
    AutoConfig.register(MODEL_TYPE, config, exist_ok=True)
    MODELS_CONFIG_MAP[ARCHITECTURE] = MambaModelConfig  # sets the cache's blocks, as for vLLM's own Mamba2
    ModelRegistry.register_model(ARCHITECTURE, "sspruner.runtime.vllm_model:ProjectedMamba2ForCausalLM")
