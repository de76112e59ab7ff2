"""Native modules of the package mamba_ssm (2.x): Mamba2 and Mamba, recognised by their attributes without an import.

Mamba2 may run its scan on d_ssm of its d_inner channels only; the others are then a gated MLP beside the scan:

    in_proj rows      [ z0: M | x0: M | z: H*P | x: H*P | B: G*N | C: G*N | dt: H ]     M = d_inner - d_ssm
    out_proj columns  [ silu(z0) * x0: M | y: H*P ]

Mamba equals transformers' MambaMixer with other attribute names. Neither module supports padding masks.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from sspruner.graph.families.mamba1_type import CHANNEL, RANK, Mamba1Type
from sspruner.graph.families.mamba1_type import STATE as STATE1
from sspruner.graph.families.mamba2_type import CONV_ROWS, HEAD, HIDDEN, IN_PROJ_ROWS, INNER, OUT, Mamba2Type
from sspruner.graph.family import Family, Projected, SelectiveProjected
from sspruner.graph.layout import Dims, Fold, Layout, Rows, Slot
from sspruner.plugins.hookspecs import hookimpl

MLP: Dims = ("mlp",)
ONE: Dims = ()  # the empty product
FOLDS = (Fold("norm.weight", ("head", "head_dim"), 0.5), Fold("norm.eps", ("head", "head_dim"), 1.0))
NATIVE_ROWS = (Rows("z0", MLP), Rows("x0", MLP), *IN_PROJ_ROWS)


class NativeMamba2(Mamba2Type):
    """Family of mamba_ssm's Mamba2 module."""

    name, mixer_class = "mamba_ssm.Mamba2", "Mamba2"
    basis_refused = "mamba_ssm's own code has no projection of B and C; load the model with transformers"

    def recognises(self, module: nn.Module) -> bool:
        return _has(
            module, "d_state", "d_inner", "d_ssm", "nheads", "headdim", "ngroups", "dt_bias"
        ) and _describes_all(self, module)

    def readout(self, mixer: Any, y: torch.Tensor, z: torch.Tensor) -> None:
        return None  # its norm is a kernel

    def layout(self, mixer: Any) -> Layout:
        return Layout(
            sizes={
                "group": mixer.ngroups,
                "head": mixer.nheads // mixer.ngroups,
                "head_dim": mixer.headdim,
                "state": mixer.d_state,
                "mlp": mixer.d_inner - mixer.d_ssm,
                "hidden": mixer.in_proj.weight.shape[1],
            },
            slots=(
                Slot("in_proj.weight", 0, NATIVE_ROWS),
                Slot("in_proj.weight", 1, HIDDEN),
                Slot("in_proj.bias", 0, NATIVE_ROWS),
                Slot("conv1d.weight", 0, CONV_ROWS),
                Slot("conv1d.bias", 0, CONV_ROWS),
                Slot("dt_bias", 0, (Rows("dt_bias", HEAD),)),
                Slot("A_log", 0, (Rows("A_log", HEAD),)),
                Slot("D", 0, (Rows("D", INNER if mixer.D_has_hdim else HEAD),)),
                Slot("norm.weight", 0, (Rows("norm", INNER),)),  # with rmsnorm=False there is none
                Slot("out_proj.weight", 1, (Rows("mlp", MLP), Rows("y", INNER))),
                Slot("out_proj.weight", 0, OUT),
                Slot("out_proj.bias", 0, OUT),
            ),
            axes={
                "state": ("group",),
                "head": ("group",),
                "head_dim": HEAD,
                **({"group": ()} if mixer.ngroups > 1 else {}),
                **({"mlp": ()} if mixer.d_inner > mixer.d_ssm else {}),
            },
            state=(*INNER, "state"),
            attributes={
                "ngroups": (("group",),),
                "nheads": (HEAD,),
                "headdim": (("head_dim",),),
                "d_state": (("state",),),
                "d_ssm": (INNER,),
                "d_inner": (INNER, MLP),
                "norm.group_size": (("head", "head_dim"),),
            },
            folds=FOLDS if mixer.rmsnorm else (),
        )

    def project(self, mixer: Any, hidden: torch.Tensor, mask: torch.Tensor) -> Projected:
        gated = 2 * (mixer.d_inner - mixer.d_ssm)  # rows before those of the scan
        view = SimpleNamespace(
            num_heads=mixer.nheads,
            head_dim=mixer.headdim,
            n_groups=mixer.ngroups,
            ssm_state_size=mixer.d_state,
            conv_dim=mixer.conv1d.weight.shape[0],
            conv_kernel_size=mixer.d_conv,
            time_step_limit=mixer.dt_limit,
            in_proj=lambda rows: mixer.in_proj(rows)[..., gated:],
            conv1d=mixer.conv1d,
            act=mixer.act,
            dt_bias=mixer.dt_bias,
            A_log=mixer.A_log,
            D=mixer.D.view(mixer.nheads, -1) if mixer.D_has_hdim else mixer.D,
        )
        return super().project(view, hidden, torch.ones_like(mask))


class NativeMamba(Mamba1Type):
    """Family of mamba_ssm's Mamba module."""

    name, mixer_class = "mamba_ssm.Mamba", "Mamba"

    def recognises(self, module: nn.Module) -> bool:
        return _has(module, "d_state", "d_inner", "dt_rank", "x_proj", "dt_proj") and _describes_all(self, module)

    def layout(self, mixer: Any) -> Layout:
        return replace(
            super().layout(_renamed(mixer)),
            attributes={
                "d_state": (STATE1,),
                "d_inner": (CHANNEL,),
                "dt_rank": (RANK,),
                # After __init__ these two are read only as d_model * expand: the channels of a cache.
                "d_model": (CHANNEL,),
                "expand": (ONE,),
            },
        )

    def project(self, mixer: Any, hidden: torch.Tensor, mask: torch.Tensor) -> SelectiveProjected:
        return super().project(_renamed(mixer), hidden, torch.ones_like(mask))


def _renamed(mixer: Any) -> SimpleNamespace:
    """Return a namespace with a native Mamba's tensors and sizes under transformers' attribute names."""
    return SimpleNamespace(
        intermediate_size=mixer.d_inner,
        ssm_state_size=mixer.d_state,
        time_step_rank=mixer.dt_rank,
        conv_kernel_size=mixer.d_conv,
        **{name: getattr(mixer, name) for name in ("in_proj", "conv1d", "x_proj", "dt_proj", "act", "A_log", "D")},
    )


def _has(module: nn.Module, *names: str) -> bool:
    return all(hasattr(module, name) for name in ("in_proj", "conv1d", "A_log", "D", "out_proj", *names))


def _describes_all(family: Family, module: nn.Module) -> bool:
    """Return whether the layout describes every parameter of `module`.

    Variants with more parameters, such as a backward scan, are not recognised.
    """
    described = {slot.tensor for slot in family.layout(module).slots}
    return all(name in described for name, _ in module.named_parameters())


@hookimpl
def sspruner_families() -> list[Family]:
    return [NativeMamba2(), NativeMamba()]
