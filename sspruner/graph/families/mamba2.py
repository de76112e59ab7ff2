"""Mamba2 in transformers (`Mamba2Mixer`): one scalar decay per head, B and C shared by the heads of a group.

Rows (G groups, K heads per group, P head dim, N state; H = G*K heads):
    in_proj rows      [ z: H*P | x: H*P | B: G*N | C: G*N | dt: H ]
    conv1d channels   [ x: H*P | B: G*N | C: G*N ]
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from sspruner.graph.family import Family, Projected
from sspruner.graph.layout import Layout, Rows, Slot
from sspruner.plugins.hookspecs import hookimpl

INNER = ("group", "head", "head_dim")
STATE = ("group", "state")
CONV_ROWS = (Rows("x", INNER), Rows("B", STATE), Rows("C", STATE))
IN_PROJ_ROWS = (Rows("z", INNER), *CONV_ROWS, Rows("dt", ("group", "head")))


class Mamba2(Family):
    """HF Mamba2. Axes: `state`, cut in the B and C rows of in_proj and in the same conv1d channels; no fold."""

    name = "mamba2"
    mixer_class = "Mamba2Mixer"
    config_names = {"state": "state_size"}

    def layout(self, mixer: Any) -> Layout:
        conv = (INNER, STATE, STATE)
        return Layout(
            sizes={
                "group": mixer.n_groups,
                "head": mixer.num_heads // mixer.n_groups,
                "head_dim": mixer.head_dim,
                "state": mixer.ssm_state_size,
            },
            slots=(
                Slot("in_proj.weight", 0, IN_PROJ_ROWS),
                Slot("in_proj.bias", 0, IN_PROJ_ROWS),
                Slot("conv1d.weight", 0, CONV_ROWS),
                Slot("conv1d.bias", 0, CONV_ROWS),
            ),
            axes={"state": ("group",)},
            state=(*INNER, "state"),
            attributes={
                "ssm_state_size": (("state",),),
                "conv_dim": conv,
                "conv1d.in_channels": conv,
                "conv1d.out_channels": conv,
                "conv1d.groups": conv,
                "in_proj.out_features": (INNER, *conv, ("group", "head")),
            },
        )

    def project(self, mixer: Any, hidden: torch.Tensor, mask: torch.Tensor) -> Projected:
        H, P, G, N = mixer.num_heads, mixer.head_dim, mixer.n_groups, mixer.ssm_state_size
        b, T, _ = hidden.shape
        keep = mask[..., None]  # (b, T, 1)
        rows = mixer.in_proj(hidden * keep)  # (b, T, rows)
        z, xBC, dt = rows.split([H * P, mixer.conv_dim, H], dim=-1)
        xBC = F.conv1d(
            xBC.transpose(1, 2).to(mixer.conv1d.weight.dtype),  # (b, channels, T)
            mixer.conv1d.weight,
            mixer.conv1d.bias,
            padding=mixer.conv_kernel_size - 1,
            groups=mixer.conv_dim,
        )[..., :T].transpose(1, 2)
        xBC = mixer.act(xBC).to(rows.dtype) * keep
        x, B, C = xBC.split([H * P, G * N, G * N], dim=-1)
        dt = F.softplus(dt + mixer.dt_bias.to(dt.dtype))
        return Projected(
            x=x.view(b, T, H, P),
            z=z,
            dt=dt.clamp(*mixer.time_step_limit),
            A=-torch.exp(mixer.A_log.float()),
            B=B.view(b, T, G, N),
            C=C.view(b, T, G, N),
            D=mixer.D,
        )


@hookimpl
def sspruner_families() -> list[Family]:
    return [Mamba2()]
