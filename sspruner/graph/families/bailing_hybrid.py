"""Bailing hybrid (Ling 3.0): KDA or gated latent attention in each layer, each followed by an MLP or experts.

Its config computes linear_head_dim from head_dim, and then gives head_dim another meaning. A saved config holds both:
only linear_head_dim is written after a cut.
"""

from __future__ import annotations

from sspruner.graph.families.kda_type import KimiDelta
from sspruner.graph.family import Family
from sspruner.plugins.hookspecs import hookimpl


class BailingHybrid(KimiDelta):
    """Family of Bailing hybrid models."""

    name, mixer_class = "bailing_hybrid", "BailingHybridDeltaAttention"


@hookimpl
def sspruner_families() -> list[Family]:
    return [BailingHybrid()]
