"""Qwen3.5, dense and with experts: a gated delta net or gated attention in each layer, each followed by an MLP."""

from sspruner.graph.families.delta_type import (
    ATTENTION_SIZES,
    CONFIG_SIZES,
    EXPERT_SIZES,
    SHARED_SIZES,
    SplitDeltaNet,
)
from sspruner.graph.family import Family
from sspruner.plugins.hookspecs import hookimpl


class Qwen35(SplitDeltaNet):
    """Family of Qwen3.5 text models, alone or inside the multimodal model."""

    name, mixer_class = "qwen3_5_text", "Qwen3_5GatedDeltaNet"
    config_sizes = CONFIG_SIZES | ATTENTION_SIZES | {"intermediate_size": (("mlp",),)}


class Qwen35Moe(SplitDeltaNet):
    """Family of Qwen3.5 text models with experts."""

    name, mixer_class = "qwen3_5_moe_text", "Qwen3_5MoeGatedDeltaNet"
    config_sizes = CONFIG_SIZES | ATTENTION_SIZES | EXPERT_SIZES | SHARED_SIZES


@hookimpl
def sspruner_families() -> list[Family]:
    return [Qwen35(), Qwen35Moe()]
