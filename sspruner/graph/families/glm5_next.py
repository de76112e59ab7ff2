"""GLM-5 next: KDA or latent attention with an indexer in each layer, each followed by an MLP or experts.

The residual stream is several copies, which learned connections mix around every module, so that no block can go.
"""

from __future__ import annotations

from sspruner.graph.families.kda_type import KimiDelta
from sspruner.graph.family import Family
from sspruner.plugins.hookspecs import hookimpl


class Glm5Next(KimiDelta):
    """Family of GLM-5 next models, inside their multimodal wrapper."""

    name, mixer_class = "glm5_next_text", "Glm5NextTextLinearAttention"
    config_repeats = ("linear_attn_config",)
    stream_refused = "its residual stream is several copies, which every block mixes (hyper-connections)"


@hookimpl
def sspruner_families() -> list[Family]:
    return [Glm5Next()]
