"""Nemotron-H: each block holds one module, a Mamba2 mixer, attention, an MLP or experts."""

from sspruner.graph.experts import EXPERTS, NEURONS
from sspruner.graph.families.mamba2_type import HEAD, Mamba2Type
from sspruner.graph.family import Family
from sspruner.plugins.hookspecs import hookimpl


class NemotronH(Mamba2Type):
    """Family of Nemotron-H models."""

    name, mixer_class = "nemotron_h", "NemotronHMamba2Mixer"
    config_sizes = {
        "ssm_state_size": (("state",),),
        "n_groups": (("group",),),
        "mamba_num_heads": (HEAD,),
        "mamba_head_dim": (("head_dim",),),
        "n_routed_experts": (EXPERTS,),
        "moe_intermediate_size": (NEURONS,),
        "moe_latent_size": (("latent",),),
    }
    config_lists = ("layers_block_type",)


@hookimpl
def sspruner_families() -> list[Family]:
    return [NemotronH()]
