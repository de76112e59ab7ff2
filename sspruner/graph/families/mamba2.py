"""Mamba2 in transformers. Its config ties hidden size, heads and head dim together: only the state size is free."""

from sspruner.graph.families.mamba2_type import Mamba2Type
from sspruner.graph.family import Family
from sspruner.plugins.hookspecs import hookimpl


class Mamba2(Mamba2Type):
    """Family of transformers' Mamba2 models."""

    name, mixer_class = "mamba2", "Mamba2Mixer"
    config_sizes = {"state_size": (("state",),)}


@hookimpl
def sspruner_families() -> list[Family]:
    return [Mamba2()]
