"""Granite 4 hybrids: Mamba2 or attention in each layer, each followed by an MLP and, in some models, experts."""

from sspruner.graph.experts import EXPERTS, NEURONS
from sspruner.graph.families.mamba2_type import Mamba2Type
from sspruner.graph.family import Family
from sspruner.plugins.hookspecs import hookimpl


class GraniteMoeHybrid(Mamba2Type):
    """Family of Granite 4 hybrid models."""

    name, mixer_class = "granitemoehybrid", "GraniteMoeHybridMambaLayer"
    config_sizes = {
        "mamba_d_state": (("state",),),
        "num_local_experts": (EXPERTS,),
        "intermediate_size": (NEURONS,),
    }
    config_lists = ("layer_types",)
    mixer_axis = True


@hookimpl
def sspruner_families() -> list[Family]:
    return [GraniteMoeHybrid()]
