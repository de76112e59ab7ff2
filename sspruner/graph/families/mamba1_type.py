"""Base family of Mamba1-type mixers: one decay per channel and state; B, C and dt are projections of x.

Rows (D channels, N state, R rank of dt):
    in_proj rows [ x: D | z: D ], conv1d D, x_proj rows [ dt: R | B: N | C: N ] and columns D,
    dt_proj rows D and columns R, A_log (D, N), D (D,), out_proj columns D
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sspruner.graph.family import Family, SelectiveProjected
from sspruner.graph.layout import Fold, Layout, Rows, Size, Slot

CHANNEL, STATE, RANK = ("channel",), ("state",), ("dt_rank",)
HIDDEN = (Rows("hidden", ("hidden",)),)
OUT = (Rows("out", ("hidden",)),)
XZ = (Rows("x", CHANNEL), Rows("z", CHANNEL))
DT_B_C = (Rows("dt", RANK), Rows("B", STATE), Rows("C", STATE))
CONFIG_SIZES: dict[str, Size] = {
    "state_size": (STATE,),
    "intermediate_size": (CHANNEL,),
    "time_step_rank": (RANK,),
    "hidden_size": (("hidden",),),
}


def normed(axis: str, rows: tuple[str, ...], *undo: tuple[str, float]) -> tuple[Fold, ...]:
    """Return the folds for an RMS norm over `axis` directly after rows of x_proj, exact without a new epsilon.

    With f = before / after, rows scaled by 1/sqrt(f) have the same mean square over fewer units as over all of them
    before, so the norm's outputs are those of before times 1/sqrt(f). `undo`: (tensor, power of f) pairs that revert
    it.
    """
    scaled = (Fold("x_proj.weight", (axis,), -0.5, rows=name) for name in rows)
    return (*scaled, *(Fold(tensor, (axis,), power) for tensor, power in undo))


class Mamba1Type(Family):
    """Base class for Mamba1 mixers with transformers' attribute names. Subclasses set name, class and norms."""

    folds: tuple[Fold, ...] = ()
    basis_refused = "every state of every channel decays at its own rate, so no other basis computes the same"

    def layout(self, mixer: Any) -> Layout:
        return Layout(
            sizes={
                "channel": mixer.intermediate_size,
                "state": mixer.ssm_state_size,
                "dt_rank": mixer.time_step_rank,
                "hidden": mixer.in_proj.weight.shape[1],
            },
            slots=(
                Slot("in_proj.weight", 0, XZ),
                Slot("in_proj.weight", 1, HIDDEN),
                Slot("in_proj.bias", 0, XZ),
                Slot("conv1d.weight", 0, (Rows("x", CHANNEL),)),
                Slot("conv1d.bias", 0, (Rows("x", CHANNEL),)),
                Slot("x_proj.weight", 0, DT_B_C),
                Slot("x_proj.weight", 1, (Rows("x", CHANNEL),)),
                Slot("dt_proj.weight", 0, (Rows("dt", CHANNEL),)),
                Slot("dt_proj.weight", 1, (Rows("rank", RANK),)),
                Slot("dt_proj.bias", 0, (Rows("dt", CHANNEL),)),
                Slot("A_log", 0, (Rows("A", CHANNEL),)),
                Slot("A_log", 1, (Rows("A", STATE),)),
                Slot("D", 0, (Rows("D", CHANNEL),)),
                Slot("b_layernorm.weight", 0, (Rows("B", STATE),)),
                Slot("c_layernorm.weight", 0, (Rows("C", STATE),)),
                *self.dt_norm_slots(mixer),
                Slot("out_proj.weight", 1, (Rows("y", CHANNEL),)),
                Slot("out_proj.weight", 0, OUT),
                Slot("out_proj.bias", 0, OUT),
            ),
            axes={"state": (), "channel": (), "dt_rank": ()},
            state=("channel", "state"),
            attributes={
                "intermediate_size": (CHANNEL,),
                "ssm_state_size": (STATE,),
                "time_step_rank": (RANK,),
                "hidden_size": (("hidden",),),
            },
            folds=self.folds,
        )

    def dt_norm_slots(self, mixer: nn.Module) -> tuple[Slot, ...]:
        """Return the slots of a norm over dt, if the family has one."""
        return ()

    def project(self, mixer: Any, hidden: torch.Tensor, mask: torch.Tensor) -> SelectiveProjected:
        D, N, R = mixer.intermediate_size, mixer.ssm_state_size, mixer.time_step_rank
        T, keep = hidden.shape[1], mask[..., None]  # (b, T, 1)
        x, z = mixer.in_proj(hidden * keep).chunk(2, dim=-1)  # (b, T, D)
        x = F.conv1d(
            x.transpose(1, 2).to(mixer.conv1d.weight.dtype),  # (b, D, T)
            mixer.conv1d.weight,
            mixer.conv1d.bias,
            padding=mixer.conv_kernel_size - 1,
            groups=D,
        )[..., :T].transpose(1, 2)
        x = mixer.act(x).to(z.dtype) * keep
        dt, B, C = mixer.x_proj(x).split([R, N, N], dim=-1)
        if hasattr(mixer, "b_layernorm"):
            dt, B, C = mixer.dt_layernorm(dt), mixer.b_layernorm(B), mixer.c_layernorm(C)
        dt = F.softplus(dt @ mixer.dt_proj.weight.T + mixer.dt_proj.bias.float())  # (b, T, D)
        return SelectiveProjected(
            x=x[:, :, None],  # one scan: (b, T, 1, D)
            z=z,
            dt=dt[:, :, None],
            A=-torch.exp(mixer.A_log.float())[None],  # (1, D, N)
            B=B[:, :, None],  # (b, T, 1, N)
            C=C[:, :, None],
            D=mixer.D[None],
        )
