"""Base family of Kimi delta attention (KDA): a gated delta rule whose decay differs by key channel.

Rows (H heads, K key channels, V value channels of each; K = V in the stock classes):
    q_proj, k_proj (H*K), v_proj (H*V), b_proj (H); conv1d channels [ q: H*K | k: H*K | v: H*V ], no bias
    decay: forget_gate.f_proj, or f_b_proj behind f_a_proj, dt_bias (H*K), forget_gate.A_log (H,) or (1, 1, H, 1)
    gate z: g_proj, or g_b_proj behind g_a_proj (H*V); o_norm (V,); o_proj columns H*V
Every head has its own q and k, so one of them is the axis `head`, and sets of key channels may differ by head. f_a_proj
and g_a_proj are factors of a rank that no head owns, and that a cut leaves alone.
q and k are normalised over the K channels of a head, and q is divided by sqrt(K): after a cut of the state y is larger
by sqrt(before / after), which the epsilon of o_norm takes up. o_norm averages over the V channels of one head, and its
weight is shared by all heads: where these keep other channels, o_proj takes it up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sspruner.graph.experts import EXPERTS, NEURONS, shared_copies
from sspruner.graph.families.delta_type import convolved, l2_normalised
from sspruner.graph.family import DeltaProjected, Family
from sspruner.graph.layout import Fold, Layout, Rows, Size, Slot
from sspruner.runtime.kda_forward import fit_forward, gate_of, is_fitted

HEAD = ("head",)
STATE = ("head", "state")
INNER = ("head", "head_dim")
HIDDEN = (Rows("hidden", ("hidden",)),)
OUT = (Rows("out", ("hidden",)),)
Q, K, V, Z = Rows("q", STATE), Rows("k", STATE), Rows("v", INNER), Rows("z", INNER)
A, B = Rows("a", STATE), Rows("b", HEAD)
CONFIG_SIZES: dict[str, Size] = {
    "linear_num_heads": (HEAD,),
    "linear_head_dim": (("head_dim",),),
    "num_local_experts": (EXPERTS,),
    "moe_intermediate_size": (NEURONS,),
}


class KimiDelta(Family):
    """Base class for KDA mixers of transformers. Subclasses set name and class."""

    config_sizes = CONFIG_SIZES
    config_lists = ("layer_types", "mlp_layer_types")
    basis_refused = "the decay differs by key channel"
    mixer_axis = True
    norm, out = "o_norm", "o_proj"

    def stock_sizes(self, layouts: Mapping[str, Layout]) -> dict[str, set[int]]:
        return super().stock_sizes(layouts) | {"n_shared_experts": shared_copies(layouts)}

    def layout(self, mixer: Any) -> Layout:
        H, gate = mixer.num_heads, mixer.forget_gate
        return Layout(
            sizes={
                "head": H,
                "head_dim": mixer.v_proj.weight.shape[0] // H,
                "state": mixer.q_proj.weight.shape[0] // H,
                "hidden": mixer.q_proj.weight.shape[1],
            },
            slots=(
                *(Slot(f"{rows.name}_proj.weight", 0, (rows,)) for rows in (Q, K, V, B)),
                *(Slot(f"forget_gate.{name}.weight", 0, (A,)) for name in ("f_proj", "f_b_proj")),
                *(Slot(f"{name}.weight", 0, (Z,)) for name in ("g_proj", "g_b_proj")),
                *(Slot(f"{name}_proj.weight", 1, HIDDEN) for name in ("q", "k", "v", "b", "g", "g_a")),
                *(Slot(f"forget_gate.{name}.weight", 1, HIDDEN) for name in ("f_proj", "f_a_proj")),
                Slot("conv1d.weight", 0, (Q, K, V)),
                Slot("forget_gate.dt_bias", 0, (Rows("dt_bias", STATE),)),
                Slot("forget_gate.A_log", 2 if gate.A_log.ndim == 4 else 0, (Rows("A_log", HEAD),)),
                Slot("o_norm.weight", 0, (Rows("norm", ("head_dim",)),)),
                Slot("o_proj.weight", 1, (Rows("y", INNER),)),
                Slot("o_proj.weight", 0, OUT),
                Slot("o_proj.bias", 0, OUT),
            ),
            axes={"state": HEAD, "head": (), "head_dim": HEAD},
            state=("head", "state", "head_dim"),
            attributes={
                "num_heads": (HEAD,),
                "head_dim": (("head_dim",),),
                "qkv_dim": (INNER,),
                "conv_dim": (STATE, STATE, INNER),
                "hidden_size": (("hidden",),),
                "forget_gate.num_heads": (HEAD,),
                "forget_gate.head_dim": (("state",),),
                "forget_gate.qkv_dim": (STATE,),
            },
            folds=(
                Fold("o_norm.weight", ("head_dim",), 0.5),
                Fold("o_norm.variance_epsilon", ("head_dim", "state"), 1.0),
            ),
            gains={"head_dim": ("o_norm.weight", "o_proj.weight")},
        )

    def fit(self, mixer: Any) -> bool:
        fit_forward(mixer)
        return is_fitted(mixer)

    def project(self, mixer: Any, hidden: torch.Tensor, mask: torch.Tensor) -> DeltaProjected:
        (b, T, _), H, keep = hidden.shape, mixer.num_heads, mask[..., None]
        hidden = hidden * keep
        qkv = torch.cat([mixer.q_proj(hidden), mixer.k_proj(hidden), mixer.v_proj(hidden)], -1)  # (b, T, H*(2K+V))
        mixed = convolved(mixer, qkv, mask)
        q, k, v = (part.reshape(b, T, H, -1) for part in torch.split(mixed, [len(p.weight) for p in _qkv(mixer)], -1))
        return DeltaProjected(
            q=l2_normalised(q) * q.shape[-1] ** -0.5,
            k=l2_normalised(k),
            v=v,
            z=gate_of(mixer, hidden),
            beta=mixer.b_proj(hidden).sigmoid() * keep,
            decay=mixer.forget_gate(hidden).float(),
        )

    def gate(self, mixer: Any, z: torch.Tensor) -> torch.Tensor:
        return z.float().sigmoid()

    def readout(self, mixer: Any, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor | None:
        heads = (*z.shape[:2], mixer.num_heads, -1)
        read: torch.Tensor = mixer.o_norm(y.reshape(heads), z.reshape(heads))  # (b, T, H, V)
        return read.flatten(2).float()


def _qkv(mixer: Any) -> tuple[Any, Any, Any]:
    return mixer.q_proj, mixer.k_proj, mixer.v_proj
