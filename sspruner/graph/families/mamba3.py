"""Mamba3 of the package mamba_ssm, recognised by its attributes without an import.

Rows (R ranks, 1 unless is_mimo; G groups, H heads, P head dim, N states, S rotary angles, which all heads share):
    in_proj [ z: H*P | x: H*P | B: R*G*N | C: R*G*N | dt: H | A: H | trap: H | angle: S ], no convolution
    B_bias, C_bias (H, R, N), dt_bias, D (H,), mimo_x, mimo_z, mimo_o (H, R, P), out_proj columns H*P
Of N/2 pairs the first S rotate: neighbours, and with is_mimo n and n + N/2. A unit of the axis `state` is one rotary
pair with its angle, and its share of the states that do not rotate: one more pair with rope_fraction 0.5.
So a cut leaves rope_fraction as it is. The angles are those of all groups, which therefore keep the same units.
B_norm and C_norm average over the N states; the norm before out_proj, if there is one, over the P channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sspruner.errors import InputError, ModelError
from sspruner.graph.family import Family, Projected
from sspruner.graph.layout import Counts, Dims, Fold, Layout, Rows, Slot
from sspruner.plugins.hookspecs import hookimpl

GROUP: Dims = ("group",)
HEAD: Dims = ("group", "head")
INNER: Dims = ("group", "head", "head_dim")
PAIRED: Dims = ("kind", "state", "half")  # kind 0 rotates; half: the two states of a pair
HALVES: Dims = ("half", "kind", "state")  # the same with is_mimo
HIDDEN = (Rows("hidden", ("hidden",)),)
OUT = (Rows("out", ("hidden",)),)
MIMO = ("mimo_x", "mimo_z", "mimo_o")
EVEN = Counts(2, 2, "its kernel takes an even number of rotary angles")
SCANLESS = (
    "the scan of mamba_ssm.Mamba3, trapezoidal and with rotated B and C, is not known here; use a scorer of weights, "
    "inputs or gradients: magnitude, random, wanda, flap, snip or taylor"
)


class NativeMamba3(Family):
    """Family of mamba_ssm's Mamba3 module."""

    name, mixer_class = "mamba_ssm.Mamba3", "Mamba3"
    basis_refused = "B and C are rotated by an angle that differs by token and pair"

    def recognises(self, module: nn.Module) -> bool:
        names = ("in_proj", "B_norm", "C_norm", "B_bias", "C_bias", "num_rope_angles", "num_bc_heads", "is_mimo", "D")
        if not all(hasattr(module, name) for name in names):
            return False
        described = {slot.tensor for slot in self.layout(module).slots}
        return all(name in described for name, _ in module.named_parameters())

    def layout(self, mixer: Any) -> Layout:
        states, N, turning = HALVES if mixer.is_mimo else PAIRED, mixer.d_state, 2 * mixer.num_rope_angles
        if N % turning:
            raise ModelError(
                f"mamba_ssm.Mamba3: {turning} of {N} states rotate; to be cut, it needs a multiple of {turning} states"
            )
        read: Dims = ("rank", "group", *states)
        rows = (
            *(Rows(name, INNER) for name in ("z", "x")),
            *(Rows(name, read) for name in ("B", "C")),
            *(Rows(name, HEAD) for name in ("dt", "A", "trap")),
            Rows("angle", ("state",)),
        )
        return Layout(
            sizes={
                "group": mixer.num_bc_heads,
                "head": mixer.nheads // mixer.num_bc_heads,
                "head_dim": mixer.headdim,
                "state": mixer.num_rope_angles,
                "kind": N // turning,
                "half": 2,
                "rank": mixer.mimo_rank,
                "hidden": mixer.in_proj.weight.shape[1],
            },
            slots=(
                Slot("in_proj.weight", 0, rows),
                Slot("in_proj.weight", 1, HIDDEN),
                *(Slot(f"{name}_norm.weight", 0, (Rows(name, states),)) for name in ("B", "C")),
                *(Slot(f"{name}_bias", 0, (Rows(name, HEAD),)) for name in ("B", "C")),
                *(Slot(f"{name}_bias", 2, (Rows(name, states),)) for name in ("B", "C")),
                *(Slot(name, 0, (Rows(name, HEAD),)) for name in ("dt_bias", "D", *MIMO)),
                *(Slot(name, (0, 2), (Rows(name, ("head_dim",)),), outer=HEAD) for name in MIMO),
                Slot("norm.weight", 0, (Rows("norm", INNER),)),
                Slot("out_proj.weight", 1, (Rows("y", INNER),)),
                Slot("out_proj.weight", 0, OUT),
                Slot("out_proj.bias", 0, OUT),  # only where a scorer or refit has added one
            ),
            axes={"state": (), "head": GROUP, "head_dim": HEAD, **({"group": ()} if mixer.num_bc_heads > 1 else {})},
            state=(*INNER, *states),
            attributes={
                "num_bc_heads": (GROUP,),
                "nheads": (HEAD,),
                "headdim": (("head_dim",),),
                "d_inner": (INNER,),
                "d_state": (states,),
                "num_rope_angles": (("state",),),
                "split_tensor_size": (("state", "half"),),
                "norm.group_size": (("head_dim",),),
            },
            folds=(
                *_folds("B_norm", "state"),
                *_folds("C_norm", "state"),
                *(_folds("norm", "head_dim") if mixer.is_outproj_norm else ()),
            ),
            counts={} if mixer.is_mimo else {"state": EVEN},
        )

    def project(self, mixer: Any, hidden: torch.Tensor, mask: torch.Tensor) -> Projected:
        raise InputError(SCANLESS)


def _folds(norm: str, axis: str) -> tuple[Fold, Fold]:
    return Fold(f"{norm}.weight", (axis,), 0.5), Fold(f"{norm}.eps", (axis,), 1.0)


@hookimpl
def sspruner_families() -> list[Family]:
    return [NativeMamba3()]
