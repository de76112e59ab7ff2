"""The modules around the mixers, recognised by what they hold: attention, MLP, experts, norms, embeddings.

Only used in models whose family is known by `model_type`. `hidden` is the width of the residual stream, which every
one of them reads or writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from sspruner.graph.layout import Fold, Layout, Rows, Slot

KV, HEADS = ("attn_head", "attn_dim"), ("attn_head", "query", "attn_dim")
MLP = ("mlp",)
HIDDEN = ("hidden",)
PACKED = (Rows("gate", MLP), Rows("up", MLP))


def attention(module: Any, hidden: int) -> Layout | None:
    """q, k, v and o projections. A unit is one key/value head with its query heads, so that their ratio stays.

    Zamba2 reads two copies of the hidden size side by side, and adds low-rank adapters to q, k and v.
    """
    if not _has(module, "q_proj", "k_proj", "v_proj", "o_proj"):
        return None
    P = module.head_dim
    kv, q = module.k_proj.weight.shape[0] // P, module.q_proj.weight.shape[0] // P
    read = (Rows("hidden", ("copy", "hidden")),)
    rows = {"q": (Rows("q", HEADS),), "k": (Rows("k", KV),), "v": (Rows("v", KV),)}
    adapters: list[Slot] = []
    for letter, made in rows.items():
        for name in _adapters(module, f"linear_{letter}_adapter_list"):
            adapters += [Slot(f"{name}.0.weight", 1, read), Slot(f"{name}.1.weight", 0, made)]
    return Layout(
        sizes={
            "attn_head": kv,
            "query": q // kv,
            "attn_dim": P,
            "hidden": hidden,
            "copy": module.q_proj.weight.shape[1] // hidden,
        },
        slots=(
            *(Slot(f"{letter}_proj.weight", 0, made) for letter, made in rows.items()),
            *(Slot(f"{letter}_proj.bias", 0, made) for letter, made in rows.items()),
            *(Slot(f"{letter}_proj.weight", 1, read) for letter in rows),
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
    )


def mlp(module: Any, hidden: int) -> Layout | None:
    """gate, up and down projections, in each of the four ways in which they are stored."""
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


def experts(module: Any, hidden: int) -> Layout | None:
    """A mixture of experts: its router, and weights (experts, out, in) of which the hidden side can be cut."""
    weights = {name: p for name, p in module.named_parameters() if p.ndim == 3}
    if not weights or not any(name.startswith("experts.") for name in weights):
        return None
    read, write = (Rows("hidden", HIDDEN),), (Rows("out", HIDDEN),)
    slots = [Slot(name, 1, read) for name, p in module.named_parameters() if name in ("gate.weight", "router.weight")]
    latent = "fc1_latent_proj.weight" in dict(module.named_parameters())
    if latent:
        slots += [Slot("fc1_latent_proj.weight", 1, read), *_writes("fc2_latent_proj")]
    else:
        slots += [Slot(name, 1, write) if name.endswith("down_proj") else Slot(name, 2, read) for name in weights]
    return Layout(
        sizes={"hidden": hidden},
        slots=tuple(slots),
        attributes=dict.fromkeys(
            ("input_size", "gate.hidden_dim", "router.hidden_dim", "experts.hidden_dim"), (HIDDEN,)
        ),
    )


def norm(module: Any, hidden: int) -> Layout | None:
    """An RMS norm over the residual stream, or over copies of it side by side."""
    weight, eps = getattr(module, "weight", None), "variance_epsilon"
    if "RMSNorm" not in type(module).__name__ or weight is None or weight.numel() % hidden or not hasattr(module, eps):
        return None
    return Layout(
        sizes={"copy": weight.numel() // hidden, "hidden": hidden},
        slots=(Slot("weight", 0, (Rows("hidden", ("copy", "hidden")),)),),
        folds=(Fold("weight", HIDDEN, 0.5), Fold(eps, HIDDEN, 1.0)),
    )


def ends(module: Any, hidden: int) -> Layout | None:
    """Embeddings, and Zamba's linear between a shared block and its mixer."""
    rows = (Rows("hidden", HIDDEN),)
    if isinstance(module, nn.Embedding):
        return Layout(sizes={"hidden": hidden}, slots=(Slot("weight", 1, rows),))
    if isinstance(module, nn.Linear) and tuple(module.weight.shape) == (hidden, hidden):
        made = (Rows("made", HIDDEN),)  # not "out": this adds nothing to the residual stream itself
        return Layout(sizes={"hidden": hidden}, slots=(Slot("weight", 0, made), Slot("weight", 1, rows)))
    return None


def output_head(hidden: int) -> Layout:
    """The output head: only its columns are hidden units, even if there are as many tokens."""
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
    """The rows of a Linear that adds to the residual stream."""
    out = (Rows("out", HIDDEN),)
    return Slot(f"{name}.weight", 0, out), Slot(f"{name}.bias", 0, out)


def _adapters(module: nn.Module, name: str) -> list[str]:
    slots = getattr(module, name, ())
    return [f"{name}.{i}" for i, adapter in enumerate(slots) if not isinstance(adapter, nn.Identity)]
