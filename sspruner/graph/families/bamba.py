"""Bamba: Mamba2 or attention in each layer, each followed by an MLP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sspruner.graph.families.mamba2_type import Mamba2Type
from sspruner.graph.family import Family
from sspruner.plugins.hookspecs import hookimpl


class Bamba(Mamba2Type):
    """Family of Bamba models."""

    name, mixer_class = "bamba", "BambaMixer"
    config_sizes = {"mamba_d_state": (("state",),)}
    mixer_axis = True

    def keep_blocks(self, model: Any, keep: Sequence[int]) -> None:
        super().keep_blocks(model, keep)
        attention = model.config.attn_layer_indices or ()
        model.config.attn_layer_indices = [i for i, old in enumerate(keep) if old in attention]


@hookimpl
def sspruner_families() -> list[Family]:
    return [Bamba()]
