"""Kimi Linear: KDA or latent attention in each layer, each followed by an MLP or experts.

Its attention has the same name in a layer as its mixer, so the mixer is recognised by its class. A published config
holds the sizes a second time, in a table that wins when it is read: a cut removes that table.
"""

from __future__ import annotations

from sspruner.graph.families.kda_type import KimiDelta
from sspruner.graph.family import Family
from sspruner.plugins.hookspecs import hookimpl


class KimiLinear(KimiDelta):
    """Family of Kimi Linear models."""

    name, mixer_class = "kimi_linear", "KimiLinearDeltaAttention"
    config_repeats = ("linear_attn_config",)


@hookimpl
def sspruner_families() -> list[Family]:
    return [KimiLinear()]
