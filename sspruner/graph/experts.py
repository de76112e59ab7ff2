"""Layout of a mixture of experts: the router, the experts in stacked tensors, and the latent space around them.

Rows (E experts in G routing groups of neighbours, I neurons of each expert, H hidden size, D latent size, else H):
    router weight (E, H), and in sigmoid routers a bias (E,) that is added for the choice alone
    gate_up (E, 2I, D)  [ gate: I | up: I ], or up (E, I, D)        down (E, D, I)
    fc1_latent_proj (D, H), fc2_latent_proj (H, D)                  where experts work in a latent space
The router and a shared expert stay on the hidden size. A shared expert is an MLP, described by itself.

An expert is gone if no token can choose it: its logit, or its bias, is -inf before the choice, so that the next best
expert moves up. With zero weights it would still take its place among the top k, and the sum would lack it. No norm is
inside, so that no axis needs a fold.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

from torch import nn

from sspruner.graph.group import BARRED, BARRED_LOGITS, ZERO
from sspruner.graph.layout import Counts, Layout, Rows, Slot

EXPERTS = ("routing_group", "expert")
NEURONS = ("expert_mlp",)
HIDDEN = ("hidden",)
GROUPED = 8  # units: experts run as one grouped matrix product, whose rows are a multiple of 16 bytes, in bf16 too


def experts(module: Any, hidden: int) -> Layout | None:
    """Return the layout of a mixture of experts whose weights are stacked, (experts, out, in); None for other modules.

    Recognised by `experts` with `down_proj` and `gate_up_proj` or `up_proj`, and a router named `gate` or `router`.
    """
    names = {name: p for name, p in module.named_parameters() if name.count(".") <= 1}
    up = next((n for n in ("experts.gate_up_proj", "experts.up_proj") if n in names), "")
    router = next((n for n in ("gate", "router") if f"{n}.weight" in names), "")
    if not up or not router or "experts.down_proj" not in names or not _plain(module.experts):
        return None
    down, latent = names["experts.down_proj"], "fc1_latent_proj.weight" in names
    gate, groups = getattr(module, router), getattr(getattr(module, router), "num_group", 1)
    space = ("latent",) if latent else HIDDEN
    neurons = (Rows("gate", NEURONS), Rows("up", NEURONS)) if up.endswith("gate_up_proj") else (Rows("up", NEURONS),)
    read, biased = (Rows("hidden", HIDDEN),), hasattr(gate, "e_score_correction_bias")
    return Layout(
        sizes={
            "routing_group": groups,
            "expert": down.shape[0] // groups,
            "expert_mlp": down.shape[2],
            **({"latent": down.shape[1]} if latent else {}),
            "hidden": hidden,
        },
        slots=(
            Slot(f"{router}.weight", 0, (Rows("router", EXPERTS),), mask=ZERO if biased else BARRED_LOGITS),
            Slot(f"{router}.weight", 1, read),
            Slot(f"{router}.e_score_correction_bias", 0, (Rows("bias", EXPERTS),), mask=BARRED),  # a buffer
            Slot(up, 0, (Rows("experts", EXPERTS),)),
            Slot(up, (0, 1), neurons, outer=EXPERTS),
            Slot(up, 2, (Rows("read", space),)),
            Slot("experts.down_proj", 0, (Rows("experts", EXPERTS),)),
            Slot("experts.down_proj", (0, 2), (Rows("down", NEURONS),), outer=EXPERTS),
            Slot("experts.down_proj", 1, (Rows("made" if latent else "out", space),)),
            *(_latent_slots() if latent else ()),
            Slot("shared_expert_gate.weight", 1, read),  # one number for each token, in Qwen's models
        ),
        axes={"expert": ("routing_group",), "expert_mlp": EXPERTS, **({"latent": ()} if latent else {})},
        attributes={
            **dict.fromkeys((f"{router}.num_experts", "experts.num_experts", "num_experts"), (EXPERTS,)),
            **dict.fromkeys(("experts.intermediate_dim", "ffn_dim"), (NEURONS,)),
            **dict.fromkeys(("input_size", "hidden_dim", f"{router}.hidden_dim", "experts.hidden_dim"), (HIDDEN,)),
        },
        counts={
            "expert": _fewest(gate, groups),
            **dict.fromkeys(("expert_mlp", "latent"), Counts(multiple_of=GROUPED)),
        },
    )


def shared_copies(layouts: Mapping[str, Layout]) -> set[int]:
    """Return how many experts wide the shared experts are, for configs that say their width so (`n_shared_experts`).

    layouts: path of a module -> its layout, as `Family.stock_sizes` gets them. A width between two multiples gives both
    numbers, of which no config can hold two.
    """
    shared = {layout.sizes["mlp"] for path, layout in layouts.items() if path.endswith(".shared_experts")}
    neurons = {layout.sizes["expert_mlp"] for layout in layouts.values() if "expert_mlp" in layout.sizes}
    return {n for width in shared for one in neurons for n in (width // one, ceil(width / one))}


def _latent_slots() -> tuple[Slot, ...]:
    """Return the slots of the projections into the latent space and out of it."""
    latent, out = ("latent",), (Rows("out", HIDDEN),)
    return (
        Slot("fc1_latent_proj.weight", 0, (Rows("latent", latent),)),
        Slot("fc1_latent_proj.bias", 0, (Rows("latent", latent),)),
        Slot("fc1_latent_proj.weight", 1, (Rows("hidden", HIDDEN),)),
        Slot("fc2_latent_proj.weight", 1, (Rows("latent", latent),)),
        Slot("fc2_latent_proj.weight", 0, out),
        Slot("fc2_latent_proj.bias", 0, out),
    )


def _fewest(router: Any, groups: int) -> Counts:
    """Return how many experts have to stay in each routing group.

    A token takes its top k from the `topk_group` best groups, and a group's score is the sum of its best two. With one
    expert some classes of transformers build a plain MLP (Jamba).
    """
    k, used = getattr(router, "top_k", 1), getattr(router, "topk_group", 1) if groups > 1 else 1
    takes = f"a token takes {k} expert{'s' if k > 1 else ''}"
    if groups > 1:
        why = f"{takes} from the {used} best of {groups} routing groups, and a group's score is that of its best 2"
    else:
        why = takes if k > 1 else "one expert alone is no mixture"
    return Counts(least=max(2, ceil(k / used)), why=why)


def _plain(stacked: nn.Module) -> bool:
    """Return whether stacked experts are (experts, out, in), gate before up, without biases and norms of their own."""
    odd = ("is_transposed", "has_bias", "has_post_expert_norm")
    return not any(getattr(stacked, name, False) for name in odd) and getattr(stacked, "is_concatenated", True)
