"""OLMo-hybrid: a gated delta net or attention in each layer, each followed by an MLP.

Its config fills fields that it lacks from others, and the write strength may be up to 2.
"""

from __future__ import annotations

from typing import Any

from sspruner.graph.families.delta_type import A, B, DeltaNet, K, Q, V, Z
from sspruner.graph.family import Family
from sspruner.graph.layout import Slot
from sspruner.plugins.hookspecs import hookimpl

PROJECTIONS = {"q_proj": Q, "k_proj": K, "v_proj": V, "g_proj": Z, "b_proj": B, "a_proj": A}


class OlmoHybrid(DeltaNet):
    """Family of OLMo-hybrid models."""

    name, mixer_class = "olmo_hybrid", "OlmoHybridGatedDeltaNet"
    norm, out = "o_norm", "o_proj"

    def projections(self, mixer: Any) -> tuple[Slot, ...]:
        return tuple(Slot(f"{name}.weight", 0, (rows,)) for name, rows in PROJECTIONS.items())


@hookimpl
def sspruner_families() -> list[Family]:
    return [OlmoHybrid()]
