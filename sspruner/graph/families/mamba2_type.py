"""Base family of Mamba2-type mixers: one scalar decay per head; the heads of a group share B and C.

Rows (G groups, K heads per group, P head dim, N state; H = G*K heads):
    in_proj rows      [ z: H*P | x: H*P | B: G*N | C: G*N | dt: H ]
    conv1d channels   [ x: H*P | B: G*N | C: G*N ]
    dt_bias, A_log, D (H,), norm (H*P,), out_proj columns H*P
A projected state (sspruner.runtime.projected_state) has size k; the rows of B and C stay N.
The norm after the scan averages over the channels of one group, so cuts of heads and of head channels need folds.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from sspruner.graph.family import Family, Projected
from sspruner.graph.layout import ENCODE, Fold, Layout, Rows, Size, Slot
from sspruner.runtime.projected_state import coordinates

HEAD = ("group", "head")
INNER = ("group", "head", "head_dim")
STATE = ("group", "state")
HIDDEN = (Rows("hidden", ("hidden",)),)
OUT = (Rows("out", ("hidden",)),)
CONV_ROWS = (Rows("x", INNER), Rows("B", STATE), Rows("C", STATE))
IN_PROJ_ROWS = (Rows("z", INNER), *CONV_ROWS, Rows("dt", HEAD))
CONV: Size = (INNER, STATE, STATE)


class Mamba2Type(Family):
    """Base class for Mamba2 mixers with transformers' attribute names. Subclasses set name, class and config fields."""

    basis_refused = ""

    def layout(self, mixer: Any) -> Layout:
        layout = self._layout(mixer)
        encode = getattr(mixer, ENCODE, None)
        return layout if encode is None else layout.projected(encode.shape[1])

    def _layout(self, mixer: Any) -> Layout:
        return Layout(
            sizes={
                "group": mixer.n_groups,
                "head": mixer.num_heads // mixer.n_groups,
                "head_dim": mixer.head_dim,
                "state": mixer.ssm_state_size,
                "hidden": mixer.in_proj.weight.shape[1],
            },
            slots=(
                Slot("in_proj.weight", 0, IN_PROJ_ROWS),
                Slot("in_proj.weight", 1, HIDDEN),
                Slot("in_proj.bias", 0, IN_PROJ_ROWS),
                Slot("mup_vector", 2, IN_PROJ_ROWS),  # a buffer of Falcon-H1
                Slot("conv1d.weight", 0, CONV_ROWS),
                Slot("conv1d.bias", 0, CONV_ROWS),
                *(Slot(name, 0, (Rows(name, HEAD),)) for name in ("dt_bias", "A_log", "D")),
                Slot("norm.weight", 0, (Rows("norm", INNER),)),
                Slot("out_proj.weight", 1, (Rows("y", INNER),)),
                Slot("out_proj.weight", 0, OUT),
                Slot("out_proj.bias", 0, OUT),
            ),
            axes={
                "state": ("group",),
                "head": ("group",),
                "head_dim": HEAD,
                **({"group": ()} if mixer.n_groups > 1 else {}),
            },
            state=(*INNER, "state"),
            attributes={
                "n_groups": (("group",),),
                "num_heads": (HEAD,),
                "head_dim": (("head_dim",),),
                "ssm_state_size": (("state",),),
                "intermediate_size": (INNER,),
                "hidden_size": (("hidden",),),
                "conv_dim": CONV,
                "groups_time_state_size": (STATE,),
                "norm.group_size": (("head", "head_dim"),),
                "norm.n_groups": (("group",),),
            },
            folds=(
                Fold("norm.weight", ("head", "head_dim"), 0.5),
                Fold("norm.variance_epsilon", ("head", "head_dim"), 1.0),
            ),
        )

    def readout(self, mixer: Any, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor | None:
        read: torch.Tensor = mixer.norm(y.flatten(2), z)  # not called for Falcon-H1 without a norm
        return read.float()

    def project(self, mixer: Any, hidden: torch.Tensor, mask: torch.Tensor) -> Projected:
        H, P, G, N = mixer.num_heads, mixer.head_dim, mixer.n_groups, mixer.ssm_state_size
        b, T, _ = hidden.shape
        keep = mask[..., None]  # (b, T, 1)
        rows = mixer.in_proj(hidden * keep * getattr(mixer, "ssm_in_multiplier", 1.0))  # (b, T, rows)
        rows = rows * getattr(mixer, "mup_vector", 1.0)
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
        if hasattr(mixer, ENCODE):
            B, C = coordinates(B, mixer.state_encode), coordinates(C, mixer.state_decode.transpose(1, 2))
        return Projected(
            x=x.view(b, T, H, P),
            z=z,
            dt=dt.clamp(*mixer.time_step_limit),
            A=-torch.exp(mixer.A_log.float()),
            B=B.reshape(b, T, G, -1),
            C=C.reshape(b, T, G, -1),
            D=mixer.D,
        )
