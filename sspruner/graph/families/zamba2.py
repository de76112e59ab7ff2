"""Zamba2: a Mamba2 mixer in every layer; hybrid layers also call a transformer block that several layers share.

A shared block selects its adapters by the index of the calling layer (`layer_dic`). Its adapter lists have one entry
per hybrid layer; entries that another block serves are Identity modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from sspruner.graph.families.mamba2_type import Mamba2Type
from sspruner.graph.family import Family
from sspruner.plugins.hookspecs import hookimpl


class Zamba2(Mamba2Type):
    """Family of Zamba2 models."""

    name, mixer_class = "zamba2", "Zamba2MambaMixer"
    config_sizes = {"mamba_d_state": (("state",),)}
    config_lists = ("layers_block_type",)

    def belongings(self, model: nn.Module, block: str) -> tuple[str, ...]:
        layer = int(block.rpartition(".")[2])
        return tuple(
            f"{path}.{name}.{module.layer_dic[layer]}"
            for path, module in model.named_modules()
            if layer in getattr(module, "layer_dic", ())
            for name, slots in module.named_children()
            if name.endswith("_adapter_list") and not isinstance(slots[module.layer_dic[layer]], nn.Identity)
        )

    def keep_blocks(self, model: Any, keep: Sequence[int]) -> None:
        super().keep_blocks(model, keep)
        config, new = model.config, {old: i for i, old in enumerate(keep)}
        config.hybrid_layer_ids = [i for i, kind in enumerate(config.layers_block_type) if kind == "hybrid"]
        for module in model.modules():
            if hasattr(module, "layer_dic"):
                module.layer_dic = {new[old]: slot for old, slot in module.layer_dic.items() if old in new}


@hookimpl
def sspruner_families() -> list[Family]:
    return [Zamba2()]
