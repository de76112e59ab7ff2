"""Falcon-H1: Mamba2 and attention side by side in every layer, then an MLP. The norm after the scan is optional."""

from sspruner.graph.families.mamba2_type import HEAD, INNER, Mamba2Type
from sspruner.graph.family import Family
from sspruner.plugins.hookspecs import hookimpl


class FalconH1(Mamba2Type):
    """Family of Falcon-H1 models."""

    name, mixer_class = "falcon_h1", "FalconH1Mixer"
    config_sizes = {
        "mamba_d_state": (("state",),),
        "mamba_n_groups": (("group",),),
        "mamba_n_heads": (HEAD,),
        "mamba_d_head": (("head_dim",),),
        "mamba_d_ssm": (INNER,),
    }
    mixer_axis = True


@hookimpl
def sspruner_families() -> list[Family]:
    return [FalconH1()]
