"""Mamba1 in transformers. State size, inner width, rank of dt and hidden size are config fields."""

from sspruner.graph.families.mamba1_type import CONFIG_SIZES, Mamba1Type
from sspruner.graph.family import Family
from sspruner.plugins.hookspecs import hookimpl


class Mamba(Mamba1Type):
    """Family of transformers' Mamba1 models."""

    name, mixer_class = "mamba", "MambaMixer"
    config_sizes, config_epsilon = CONFIG_SIZES, "layer_norm_epsilon"


@hookimpl
def sspruner_families() -> list[Family]:
    return [Mamba()]
