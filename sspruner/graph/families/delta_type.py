"""Base family of gated delta nets: one decay and one write strength per value head; value heads share a key head.

Rows (G key heads, R value heads of each, H = G*R, K key channels, V value channels):
    conv1d channels   [ q: G*K | k: G*K | v: H*V ], no bias
    rows of q, k, v, of the gate z (H*V), of b and a (H), in tensors that differ by family
    A_log, dt_bias (H,), norm (V,), out projection columns H*V
q and k are normalised over the K channels of a head, and q is divided by sqrt(K): after a cut of the state y is larger
by sqrt(before / after), which the epsilon of the norm after the scan takes up. That norm averages over the channels of
one head, and its weight is shared by all heads: where these keep other channels, the output projection takes it up.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

from sspruner.graph.experts import EXPERTS, NEURONS
from sspruner.graph.family import DeltaProjected, Family
from sspruner.graph.layout import ENCODE, Fold, Layout, Rows, Size, Slot
from sspruner.runtime.projected_state import coordinates, delta_rows

HEAD = ("group", "head")
INNER = ("group", "head", "head_dim")
STATE = ("group", "state")
HIDDEN = (Rows("hidden", ("hidden",)),)
OUT = (Rows("out", ("hidden",)),)
Q, K, V, Z = Rows("q", STATE), Rows("k", STATE), Rows("v", INNER), Rows("z", INNER)
B, A = Rows("b", HEAD), Rows("a", HEAD)
CONFIG_SIZES: dict[str, Size] = {
    "linear_num_key_heads": (("group",),),
    "linear_num_value_heads": (HEAD,),
    "linear_key_head_dim": (("state",),),
    "linear_value_head_dim": (("head_dim",),),
}
ATTENTION_SIZES: dict[str, Size] = {
    "num_key_value_heads": (("attn_head",),),
    "num_attention_heads": (("attn_head", "query"),),
}
EXPERT_SIZES: dict[str, Size] = {"num_experts": (EXPERTS,), "moe_intermediate_size": (NEURONS,)}
SHARED_SIZES: dict[str, Size] = {"shared_expert_intermediate_size": (("mlp",),)}


class DeltaNet(Family):
    """Base class for gated delta nets of transformers. Subclasses set name, class and where the rows are."""

    config_sizes = CONFIG_SIZES
    config_lists = ("layer_types",)
    mixer_axis = True
    basis_refused = ""

    @abstractmethod
    def projections(self, mixer: Any) -> tuple[Slot, ...]:
        """Return the slots of the input projections along dim 0."""

    def layout(self, mixer: Any) -> Layout:
        layout = self._layout(mixer)
        encode = getattr(mixer, ENCODE, None)
        return layout if encode is None else layout.projected(encode.shape[1])

    def _layout(self, mixer: Any) -> Layout:
        inputs = self.projections(mixer)
        norm = f"{self.norm}.weight"
        return Layout(
            sizes={
                "group": mixer.num_k_heads,
                "head": mixer.num_v_heads // mixer.num_k_heads,
                "head_dim": mixer.head_v_dim,
                "state": mixer.head_k_dim,
                "hidden": getattr(mixer, inputs[0].tensor.partition(".")[0]).weight.shape[1],
            },
            slots=(
                *inputs,
                *(Slot(slot.tensor, 1, HIDDEN) for slot in inputs),
                Slot("conv1d.weight", 0, (Q, K, V)),
                *(Slot(name, 0, (Rows(name, HEAD),)) for name in ("dt_bias", "A_log")),
                Slot(norm, 0, (Rows("norm", ("head_dim",)),)),
                Slot(f"{self.out}.weight", 1, (Rows("y", INNER),)),
                Slot(f"{self.out}.weight", 0, OUT),
                Slot(f"{self.out}.bias", 0, OUT),
            ),
            axes={
                "state": ("group",),
                "head": ("group",),
                "head_dim": HEAD,
                **({"group": ()} if mixer.num_k_heads > 1 else {}),
            },
            state=("group", "head", "state", "head_dim"),
            attributes={
                "num_k_heads": (("group",),),
                "num_v_heads": (HEAD,),
                "head_k_dim": (("state",),),
                "head_v_dim": (("head_dim",),),
                "key_dim": (STATE,),
                "value_dim": (INNER,),
                "conv_dim": (STATE, STATE, INNER),
                "hidden_size": (("hidden",),),
            },
            folds=(
                Fold(norm, ("head_dim",), 0.5),
                Fold(f"{self.norm}.variance_epsilon", ("head_dim", "state"), 1.0),
            ),
            gains={"head_dim": (norm, f"{self.out}.weight")},
        )

    def project(self, mixer: Any, hidden: torch.Tensor, mask: torch.Tensor) -> DeltaProjected:
        b, T, _ = hidden.shape
        qkv, z, write, rate = delta_rows(mixer, hidden * mask[..., None])
        qkv = convolved(mixer, qkv, mask)
        keys = mixer.num_k_heads * mixer.head_k_dim
        q, k, v = torch.split(qkv, [keys, keys, qkv.shape[-1] - 2 * keys], dim=-1)
        q, k = (l2_normalised(part.reshape(b, T, mixer.num_k_heads, mixer.head_k_dim)) for part in (q, k))
        q = q * mixer.head_k_dim**-0.5
        if hasattr(mixer, ENCODE):
            k = coordinates(k.flatten(2), mixer.state_encode)
            q = coordinates(q.flatten(2), mixer.state_decode.transpose(1, 2))
        return DeltaProjected(
            q=q,
            k=k,
            v=v.reshape(b, T, mixer.num_v_heads, mixer.head_v_dim),
            z=z.reshape(b, T, -1),
            beta=write.sigmoid() * (2.0 if getattr(mixer, "allow_neg_eigval", False) else 1.0) * mask[..., None],
            decay=-mixer.A_log.float().exp() * F.softplus(rate.float() + mixer.dt_bias),
        )

    def gate(self, mixer: Any, z: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(z.float()) if getattr(mixer, self.norm).activation == "sigmoid" else super().gate(mixer, z)

    def readout(self, mixer: Any, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor | None:
        heads = (-1, mixer.head_v_dim)
        read: torch.Tensor = getattr(mixer, self.norm)(y.reshape(heads), z.reshape(heads))  # (b T H, V)
        return read.reshape(z.shape).float()


def convolved(mixer: Any, rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Apply a delta rule's convolution and activation to its rows of q, k and v: (b, T, channels), zero at padding."""
    weight = mixer.conv1d.weight
    out = F.conv1d(
        rows.transpose(1, 2).to(weight.dtype),  # (b, channels, T)
        weight,
        padding=weight.shape[-1] - 1,
        groups=len(weight),
    )[..., : rows.shape[1]].transpose(1, 2)
    activated: torch.Tensor = ACT2FN[mixer.activation](out).to(rows.dtype) * mask[..., None]
    return activated


def l2_normalised(rows: torch.Tensor) -> torch.Tensor:
    """Divide vectors by their length, as the kernels do: x / sqrt(sum x^2 + 1e-6), in fp32 or wider; rows (..., K)."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return wide * (wide.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


class SplitDeltaNet(DeltaNet):
    """Gated delta net whose rows of q, k and v are in one projection, those of z, b and a in one each."""

    def projections(self, mixer: Any) -> tuple[Slot, ...]:
        return (
            Slot("in_proj_qkv.weight", 0, (Q, K, V)),
            Slot("in_proj_z.weight", 0, (Z,)),
            Slot("in_proj_b.weight", 0, (B,)),
            Slot("in_proj_a.weight", 0, (A,)),
        )
