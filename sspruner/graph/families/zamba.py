"""Zamba (v1): several independent Mamba1 heads in a mixer, with the rows of x and z interleaved in in_proj.

x_proj_weight (heads, R + 2 N, P), dt_proj_weight (heads, P, R), A_log (heads, P, N): every head has its own B, C and
dt, so index sets may differ by head; counts may not.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from sspruner.graph.families.mamba1_type import DT_B_C, HIDDEN, OUT, RANK, STATE
from sspruner.graph.family import Family, SelectiveProjected
from sspruner.graph.layout import Layout, Rows, Slot
from sspruner.plugins.hookspecs import hookimpl

HEAD, HEAD_DIM, INNER = ("head",), ("head_dim",), ("head", "head_dim")


class Zamba(Family):
    """Family of Zamba (v1) models."""

    name, mixer_class = "zamba", "ZambaMambaMixer"
    basis_refused = "every state of every channel decays at its own rate, so no other basis computes the same"
    config_sizes = {"mamba_d_state": (STATE,), "mamba_dt_rank": (RANK,)}
    config_lists = ("layers_block_type",)

    def layout(self, mixer: Any) -> Layout:
        interleaved = (Rows("x", ()), Rows("z", ()))
        x = (Rows("x", INNER),)
        by_head = ("x_proj_weight", "dt_proj_weight", "dt_proj_bias", "A_log", "D")
        return Layout(
            sizes={
                "head": mixer.n_mamba_heads,
                "head_dim": mixer.mamba_head_dim,
                "state": mixer.ssm_state_size,
                "dt_rank": mixer.time_step_rank,
                "hidden": mixer.in_proj.weight.shape[1],
            },
            slots=(
                Slot("in_proj.weight", 0, interleaved, outer=INNER),
                Slot("in_proj.weight", 1, HIDDEN),
                Slot("in_proj.bias", 0, interleaved, outer=INNER),
                Slot("conv1d.weight", 0, x),
                Slot("conv1d.bias", 0, x),
                *(Slot(name, 0, (Rows(name, HEAD),)) for name in by_head),
                Slot("x_proj_weight", (0, 1), DT_B_C, outer=HEAD),
                Slot("x_proj_weight", (0, 2), (Rows("x", HEAD_DIM),), outer=HEAD),
                Slot("dt_proj_weight", (0, 1), (Rows("dt", HEAD_DIM),), outer=HEAD),
                Slot("dt_proj_weight", (0, 2), (Rows("rank", RANK),), outer=HEAD),
                Slot("dt_proj_bias", (0, 1), (Rows("dt", HEAD_DIM),), outer=HEAD),
                Slot("A_log", (0, 1), (Rows("A", HEAD_DIM),), outer=HEAD),
                Slot("A_log", (0, 2), (Rows("A", STATE),), outer=HEAD),
                Slot("D", (0, 1), (Rows("D", HEAD_DIM),), outer=HEAD),
                Slot("out_proj.weight", 1, (Rows("y", INNER),)),
                Slot("out_proj.weight", 0, OUT),
                Slot("out_proj.bias", 0, OUT),
            ),
            axes={"state": HEAD, "head": (), "head_dim": HEAD, "dt_rank": HEAD},
            state=(*INNER, "state"),
            attributes={
                "n_mamba_heads": (HEAD,),
                "mamba_head_dim": (HEAD_DIM,),
                "intermediate_size": (INNER,),
                "ssm_state_size": (STATE,),
                "time_step_rank": (RANK,),
                "hidden_size": (("hidden",),),
            },
        )

    def project(self, mixer: Any, hidden: torch.Tensor, mask: torch.Tensor) -> SelectiveProjected:
        heads, P, N, R = mixer.n_mamba_heads, mixer.mamba_head_dim, mixer.ssm_state_size, mixer.time_step_rank
        (b, T, _), keep = hidden.shape, mask[..., None]  # (b, T, 1)
        x, z = mixer.in_proj(hidden * keep).view(b, T, -1, 2).unbind(-1)  # (b, T, heads * P)
        x = F.conv1d(
            x.transpose(1, 2).to(mixer.conv1d.weight.dtype),  # (b, heads * P, T)
            mixer.conv1d.weight,
            mixer.conv1d.bias,
            padding=mixer.conv_kernel_size - 1,
            groups=heads * P,
        )[..., :T].transpose(1, 2)
        x = (mixer.act(x).to(z.dtype) * keep).view(b, T, heads, P)
        dt, B, C = torch.split(torch.einsum("bthp,hrp->bthr", x, mixer.x_proj_weight), [R, N, N], dim=-1)
        dt = torch.einsum("bthr,hpr->bthp", dt, mixer.dt_proj_weight) + mixer.dt_proj_bias.float()
        A = -torch.exp(mixer.A_log.float())  # (heads, P, N)
        return SelectiveProjected(x=x, z=z, dt=F.softplus(dt), A=A, B=B, C=C, D=mixer.D)


@hookimpl
def sspruner_families() -> list[Family]:
    return [Zamba()]
