"""Layouts of the modules around the mixers: attention, MLP, norms, embeddings; experts are in experts.py.

Modules are recognised by their attributes, and only in models whose family is known by `model_type`. Every layout
has the dimension `hidden`, the width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from sspruner.graph.experts import experts
from sspruner.graph.layout import Fold, Layout, Rows, Slot

KV, HEADS = ("attn_head", "attn_dim"), ("attn_head", "query", "attn_dim")
QUERIES = ("attn_head", "query", "part", "attn_dim")
MLP = ("mlp",)
HIDDEN = ("hidden",)
PACKED = (Rows("gate", MLP), Rows("up", MLP))


def attention(module: Any, hidden: int) -> Layout | None:
    """Return the layout of an attention module with q, k, v and o projections, or None for other modules.

    A unit is one key/value head with its query heads, so that the number of query heads per key/value head is
    unchanged. Zamba2's attention reads two copies of the hidden size side by side and has low-rank adapters on q, k and
    v. Gated attention has the rows of the gate beside those of each query head. A norm of q or k may average over all
    heads, and takes a fold then.
    """
    if _has(module, "kv_b_proj", "o_proj"):
        return latent_attention(module, hidden)
    if not _has(module, "q_proj", "k_proj", "v_proj", "o_proj"):
        return None
    P = module.head_dim
    kv, q = module.k_proj.weight.shape[0] // P, module.o_proj.weight.shape[1] // P
    read = (Rows("hidden", ("copy", "hidden")),)
    rows = {"q": (Rows("q", QUERIES),), "k": (Rows("k", KV),), "v": (Rows("v", KV),)}
    adapters: list[Slot] = []
    for letter, out_rows in rows.items():
        for name in _adapters(module, f"linear_{letter}_adapter_list"):
            adapters += [Slot(f"{name}.0.weight", 1, read), Slot(f"{name}.1.weight", 0, out_rows)]
    over_heads = [
        n for n, heads in (("q", q), ("k", kv)) if _normed_together(getattr(module, f"{n}_norm", None), heads * P)
    ]
    return Layout(
        sizes={
            "attn_head": kv,
            "query": q // kv,
            "part": module.q_proj.weight.shape[0] // (q * P),  # the query, and its gate
            "attn_dim": P,
            "hidden": hidden,
            "copy": module.q_proj.weight.shape[1] // hidden,
        },
        slots=(
            *(Slot(f"{letter}_proj.weight", 0, out_rows) for letter, out_rows in rows.items()),
            *(Slot(f"{letter}_proj.bias", 0, out_rows) for letter, out_rows in rows.items()),
            *(Slot(f"{letter}_proj.weight", 1, read) for letter in rows),
            *(Slot(f"{n}_norm.weight", 0, (Rows(n, HEADS if n == "q" else KV),)) for n in over_heads),
            *adapters,
            Slot("o_proj.weight", 1, (Rows("heads", HEADS),)),
            *_writes("o_proj"),
        ),
        axes={"attn_head": ()},
        attributes={
            "num_heads": (("attn_head", "query"),),
            "num_attention_heads": (("attn_head", "query"),),
            "num_key_value_heads": (("attn_head",),),
        },
        folds=tuple(
            fold for n in over_heads for fold in _norm_folds(getattr(module, f"{n}_norm"), f"{n}_norm.", "attn_head")
        ),
    )


def latent_attention(module: Any, hidden: int) -> Layout:
    """Return the layout of latent attention (MLA), whose keys and values are made from one narrow vector for all heads.

    A unit is one head: its rows of q and of keys and values, its columns of o, and its row of a gate, if there is one.
    What makes the narrow vectors belongs to no head. Source: DeepSeek-V2, arXiv 2405.04434, section 2.1.
    """
    heads = module.kv_b_proj.weight.shape[0] // (module.qk_nope_head_dim + module.v_head_dim)
    q, kv = (Rows("q", ("attn_head", "qk_dim")),), (Rows("kv", ("attn_head", "kv_dim")),)
    reads = ("q_proj", "q_a_proj", "kv_a_proj_with_mqa", "g_proj")
    return Layout(
        sizes={
            "attn_head": heads,
            "qk_dim": module.qk_nope_head_dim + module.qk_rope_head_dim,
            "kv_dim": module.qk_nope_head_dim + module.v_head_dim,
            "v_dim": module.v_head_dim,
            "narrow": module.kv_a_proj_with_mqa.weight.shape[0],
            "hidden": hidden,
        },
        slots=(
            *(Slot(f"{name}.weight", 0, q) for name in ("q_proj", "q_b_proj")),
            Slot("kv_b_proj.weight", 0, kv),
            Slot("g_proj.weight", 0, (Rows("g", ("attn_head",)),)),
            *(Slot(f"{name}.weight", 1, (Rows("hidden", HIDDEN),)) for name in reads),
            Slot("o_proj.weight", 1, (Rows("heads", ("attn_head", "v_dim")),)),
            *_writes("o_proj"),
        ),
        axes={"attn_head": ()},
        attributes={"num_heads": (("attn_head",),)},
    )


def keys_and_values(layout: Layout) -> int:
    """Return how many numbers of keys and values an attention layer of transformers keeps of each token."""
    return layout.sizes["narrow"] if "narrow" in layout.sizes else 2 * layout.count(KV)  # latent attention: one vector


def mlp(module: Any, hidden: int) -> Layout | None:
    """Return the layout of an MLP, or None for other modules.

    Recognises four ways to store gate, up and down projections: packed `gate_up_proj`, packed `input_linear`, separate
    `gate_proj` and `up_proj`, and `up_proj` without a gate.
    """
    if _has(module, "gate_up_proj", "down_proj"):
        first: dict[str, tuple[Rows, ...]] = {"gate_up_proj": PACKED}
        last = "down_proj"
    elif _has(module, "input_linear", "output_linear"):
        first, last = {"input_linear": PACKED}, "output_linear"
    elif _has(module, "gate_proj", "up_proj", "down_proj"):
        first, last = {"gate_proj": (Rows("gate", MLP),), "up_proj": (Rows("up", MLP),)}, "down_proj"
    elif _has(module, "up_proj", "down_proj"):
        first, last = {"up_proj": (Rows("up", MLP),)}, "down_proj"
    else:
        return None
    read = (Rows("hidden", HIDDEN),)
    slots: list[Slot] = []
    for name, rows in first.items():
        slots += [Slot(f"{name}.weight", 0, rows), Slot(f"{name}.bias", 0, rows), Slot(f"{name}.weight", 1, read)]
    for name in _adapters(module, "gate_up_proj_adapter_list"):
        slots += [Slot(f"{name}.0.weight", 1, read), Slot(f"{name}.1.weight", 0, PACKED)]
    slots += [Slot(f"{last}.weight", 1, (Rows("down", MLP),)), *_writes(last)]
    return Layout(
        sizes={"mlp": getattr(module, last).weight.shape[1], "hidden": hidden},
        slots=tuple(slots),
        axes={"mlp": ()},
        attributes={"intermediate_size": (MLP,)},
    )


def norm(module: Any, hidden: int) -> Layout | None:
    """Return the layout of an RMS norm over the residual stream, or over copies of it; None for other modules."""
    weight = getattr(module, "weight", None)
    named = "RMSNorm" in type(module).__name__
    if not named or weight is None or weight.numel() % hidden or not _epsilon(module):
        return None
    return Layout(
        sizes={"copy": weight.numel() // hidden, "hidden": hidden},
        slots=(Slot("weight", 0, (Rows("hidden", ("copy", "hidden")),)),),
        folds=_norm_folds(module, "", "hidden"),
    )


def _norm_folds(module: Any, prefix: str, axis: str) -> tuple[Fold, ...]:
    """Return the folds of an RMS norm that averages over `axis`."""
    kind: Any = type(module)
    offset = 1.0 if zero_centred(kind) else 0.0
    return (
        Fold(f"{prefix}weight", (axis,), 0.5, offset=offset),
        Fold(f"{prefix}{_epsilon(module)}", (axis,), 1.0),
    )


def _normed_together(module: Any, width: int) -> bool:
    """Return whether a norm of queries or keys averages over all heads, `width` numbers."""
    weight = getattr(module, "weight", None)
    return weight is not None and weight.numel() == width and bool(_epsilon(module))


def _epsilon(module: Any) -> str:
    """Return the name of an RMS norm's epsilon, "" if it has none that is known."""
    return next((name for name in ("variance_epsilon", "eps") if isinstance(getattr(module, name, None), float)), "")


@lru_cache
def zero_centred(kind: type[nn.Module]) -> bool:
    """Return whether an RMS norm of this class multiplies by 1 + weight, as Qwen's do: one with weight 0 shows it."""
    with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
        try:
            probe = kind(2)
        except TypeError:  # a gated norm, which takes more than its width
            return False
        probe.weight.zero_()  # type: ignore[operator]
        return bool(probe(torch.ones(1, 2)).abs().amax() > 0)


def ends(module: Any, hidden: int) -> Layout | None:
    """Return the layout of an embedding, or of Zamba's linear layer between a shared block and its mixer; else None."""
    rows = (Rows("hidden", HIDDEN),)
    if isinstance(module, nn.Embedding):
        return Layout(sizes={"hidden": hidden}, slots=(Slot("weight", 1, rows),))
    if isinstance(module, nn.Linear) and tuple(module.weight.shape) == (hidden, hidden):
        out_rows = (Rows("made", HIDDEN),)  # not "out": its output is not added to the residual stream
        return Layout(sizes={"hidden": hidden}, slots=(Slot("weight", 0, out_rows), Slot("weight", 1, rows)))
    return None


def output_head(hidden: int) -> Layout:
    """Return the layout of the output head. Only its columns are hidden units, whatever the vocabulary size."""
    return Layout(sizes={"hidden": hidden}, slots=(Slot("weight", 1, (Rows("hidden", HIDDEN),)),))


PARTS: dict[str, Callable[[Any, int], Layout | None]] = {
    "attention": attention,
    "mlp": mlp,
    "experts": experts,
    "norm": norm,
    "ends": ends,
}


def _has(module: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Linear) for name in names)


def _writes(name: str) -> tuple[Slot, Slot]:
    """Return the slots of a linear layer whose output is added to the residual stream."""
    out = (Rows("out", HIDDEN),)
    return Slot(f"{name}.weight", 0, out), Slot(f"{name}.bias", 0, out)


def _adapters(module: nn.Module, name: str) -> list[str]:
    slots = getattr(module, name, ())
    return [f"{name}.{i}" for i, adapter in enumerate(slots) if not isinstance(adapter, nn.Identity)]
