"""Qwen4-exp: a gated delta net or indexed attention in each layer; the residual stream is several copies.

The copies are mixed by hyper-connections in every block, whatever its modules put out.
"""

from sspruner.graph.families.delta_type import CONFIG_SIZES, EXPERT_SIZES, SHARED_SIZES, SplitDeltaNet
from sspruner.graph.family import Family
from sspruner.plugins.hookspecs import hookimpl


class Qwen4Exp(SplitDeltaNet):
    """Family of Qwen4-exp text models."""

    name, mixer_class = "qwen4_exp_text", "Qwen4ExpTextGatedDeltaNet"
    config_sizes = CONFIG_SIZES | EXPERT_SIZES | SHARED_SIZES
    stream_refused = "its residual stream is several copies, which every block mixes (hyper-connections)"


@hookimpl
def sspruner_families() -> list[Family]:
    return [Qwen4Exp()]
