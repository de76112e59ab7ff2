"""Falcon-Mamba: Mamba1 with RMS norms without weights on dt, B and C.

There is no gain to fold a cut of the state into, so D and out_proj take it: B and C come out of their norms smaller by
1/sqrt(f) each, the scan by 1/f; with D by 1/f as well the whole of y is smaller by 1/f, and out_proj gives it back.
"""

from typing import Any

from sspruner.graph.families.mamba1_type import CHANNEL, CONFIG_SIZES, Mamba1Type, normed
from sspruner.graph.family import Family
from sspruner.graph.layout import Rows, Slot
from sspruner.plugins.hookspecs import hookimpl


class FalconMamba(Mamba1Type):
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
