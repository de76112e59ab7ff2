"""Lara mini (transformers 5.24): gated delta nets, and attention with a window or without, each followed by experts.

The mixers are those of Qwen3.5; a checkpoint holds their input projections in one tensor, which transformers splits.
"""

from sspruner.graph.families.delta_type import (
    ATTENTION_SIZES,
    CONFIG_SIZES,
    EXPERT_SIZES,
    SHARED_SIZES,
    SplitDeltaNet,
)
from sspruner.graph.family import Family
from sspruner.plugins.hookspecs import hookimpl


class LaraMini(SplitDeltaNet):
    """Family of Lara mini models."""

    name, mixer_class = "lara_mini", "LaraMiniGatedDeltaNet"
    config_sizes = CONFIG_SIZES | ATTENTION_SIZES | EXPERT_SIZES | SHARED_SIZES


@hookimpl
def sspruner_families() -> list[Family]:
    return [LaraMini()]
