"""Hypothesis strategies: a tiny random model of any family, with any structure that the family supports."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from transformers import PreTrainedModel

from sspruner.testing.models import FAMILIES, zoo

_SHAPES: dict[str, st.SearchStrategy[Any]] = {
    "layers": st.sampled_from(["MM", "MMM", "MMMM"]),
    "groups": st.integers(1, 2),
    "heads": st.integers(1, 3),
    "channels": st.sampled_from([4, 6, 8]),
    "hidden": st.sampled_from([8, 16]),
    "state": st.integers(1, 8),
    "rank": st.integers(1, 4),
    "kv": st.integers(1, 2),
    "ratio": st.integers(1, 2),
    **dict.fromkeys(("bias", "conv_bias", "adapters", "tie_word_embeddings"), st.booleans()),
}
_HYBRID = st.sampled_from(["AM", "MA", "AMA", "MAA", "MAMA", "AMAA"])  # zamba, zamba2: there is a Mamba in A too
_MIXED = st.sampled_from(["MAM", "MMA", "AMM", "MMAM", "AMMA"])
_OWN: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "zamba2": {"layers": _HYBRID, "num_mem_blocks": st.integers(1, 2), "use_mem_rope": st.booleans()},
    "bamba": {"layers": _MIXED},
    "granitemoehybrid": {
        "layers": _MIXED,
        "channels": st.just(16),
        "experts": st.sampled_from([0, 3]),
        "position_embedding_type": st.sampled_from([None, "rope"]),
    },
    "falcon_h1": {
        "layers": st.sampled_from(["AA", "AAA"]),
        "mamba_rms_norm": st.booleans(),
        "mamba_norm_before_gate": st.booleans(),
    },
    "nemotron_h": {
        "layers": st.sampled_from(["MAM", "M-AM", "AMEM", "MM-A", "EMAM", "MEA-M"]),
        "moe_latent_size": st.sampled_from([None, 16]),
    },
    "jamba": {"layers": st.sampled_from(["MAM", "MMA", "AMM", "MAMM"]), "experts": st.sampled_from([1, 3])},
    "qwen3_next": {"layers": _MIXED, "experts": st.sampled_from([0, 3])},
    "qwen3_5_text": {"layers": _MIXED},
    "qwen3_5_moe_text": {"layers": _MIXED},
    "qwen4_exp_text": {"layers": _MIXED},
    "olmo_hybrid": {"layers": _MIXED},
    "lara_mini": {"layers": _MIXED},
    "kimi_linear": {"layers": _MIXED, "experts": st.sampled_from([0, 3]), "q_lora_rank": st.sampled_from([None, 5])},
    "bailing_hybrid": {"layers": _MIXED, "experts": st.sampled_from([0, 3]), "kda_safe_gate": st.booleans()},
    "glm5_next_text": {"layers": _MIXED, "experts": st.sampled_from([0, 3])},
    "zamba": {"layers": st.sampled_from(["AA", "AMA", "MAA", "MAMA"])},  # stock cannot tie a single A
}


@st.composite
def zoo_models(draw: st.DrawFn, families: tuple[str, ...] = FAMILIES) -> PreTrainedModel:
    """Draw a model of any family with any structure; shrinks to a small model of the first family."""
    family = draw(st.sampled_from(families))
    structure = draw(st.fixed_dictionaries(_SHAPES | _OWN.get(family, {})))
    return zoo(family, seed=draw(st.integers(0, 2**16)), **structure)
