"""Jamba: Mamba1 with RMS norms on dt, B and C, or attention, in each layer, each followed by an MLP or experts.

Its config computes the kind of each layer from a period. After blocks were removed, the kinds are stored as a list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sspruner.graph.experts import EXPERTS, NEURONS
from sspruner.graph.families.mamba1_type import RANK, Mamba1Type, normed
from sspruner.graph.family import Family
from sspruner.graph.layout import Layout, Rows, Slot
from sspruner.plugins.hookspecs import hookimpl


class Jamba(Mamba1Type):
    """Family of Jamba models."""

    name, mixer_class = "jamba", "JambaMambaMixer"
    config_sizes = {
        "mamba_d_state": (("state",),),
        "mamba_dt_rank": (RANK,),
        "num_experts": (EXPERTS,),
        "intermediate_size": (NEURONS,),
    }
    couplings = dict.fromkeys(
        ("expert_mlp", "mlp"),
        "expert_mlp and mlp at one size: intermediate_size is the width of the experts and of other layers' MLPs",
    )
    mixer_axis = True
    folds = (
        *normed("state", ("B", "C"), ("b_layernorm.weight", 0.5), ("c_layernorm.weight", 0.5)),
        *normed("dt_rank", ("dt",), ("dt_layernorm.weight", 0.5)),
    )

    def dt_norm_slots(self, mixer: Any) -> tuple[Slot, ...]:
        return (Slot("dt_layernorm.weight", 0, (Rows("dt", RANK),)),)

    def stock_sizes(self, layouts: Mapping[str, Layout]) -> dict[str, set[int]]:
        values = super().stock_sizes(layouts)
        values["intermediate_size"] |= {layout.sizes["mlp"] for layout in layouts.values() if "mlp" in layout.sizes}
        return values

    def keep_blocks(self, model: Any, keep: Sequence[int]) -> None:
        config = model.config
        kinds = [config.layers_block_type[i] for i in keep]
        experts = [config.layers_num_experts[i] for i in keep]
        super().keep_blocks(model, keep)
        base = next(c for c in type(config).__mro__ if c.__name__ == "JambaConfig")
        config.__class__ = type("JambaConfig", (base,), {"layers_block_type": kinds, "layers_num_experts": experts})


@hookimpl
def sspruner_families() -> list[Family]:
    return [Jamba()]
