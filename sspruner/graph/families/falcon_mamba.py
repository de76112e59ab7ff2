"""Falcon-Mamba: Mamba1 with RMS norms without weights on dt, B and C.

These norms have no weight that could absorb a cut of the state, so D and out_proj absorb it: after the cut, B and C
are smaller by 1/sqrt(f) each and the scan's sum by 1/f; with D scaled by 1/f, too, all of y is smaller by 1/f, and
out_proj is scaled by f.
"""

from typing import Any

from sspruner.graph.families.mamba1_type import CHANNEL, CONFIG_SIZES, Mamba1Type, normed
from sspruner.graph.family import Family
from sspruner.graph.layout import Rows, Slot
from sspruner.plugins.hookspecs import hookimpl


class FalconMamba(Mamba1Type):
    """Family of Falcon-Mamba models."""

    name, mixer_class = "falcon_mamba", "FalconMambaMixer"
    config_sizes, config_epsilon = CONFIG_SIZES, "layer_norm_epsilon"
    folds = (
        *normed("state", ("B", "C"), ("D", -1.0), ("out_proj.weight", 1.0)),
        *normed("dt_rank", ("dt",), ("dt_proj.weight", 0.5)),
    )

    def dt_norm_slots(self, mixer: Any) -> tuple[Slot, ...]:
        return (Slot("dt_layernorm.weight", 0, (Rows("dt", CHANNEL),)),)  # a buffer of ones, as wide as the channels


@hookimpl
def sspruner_families() -> list[Family]:
    return [FalconMamba()]
