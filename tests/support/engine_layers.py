"""Layers of published models, as plain numbers, for the formulas of engines."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from sspruner.benchmarking.cache_layers import CacheLayers, RecurrentLayer

GIB = 2**30
CONTEXTS = (4096, 32768, 131072)


def mamba2(heads: int, head_dim: int, state: int, groups: int) -> RecurrentLayer:
    return RecurrentLayer(heads * head_dim, heads * head_dim * state, 4, heads, groups, 2 * groups * state)


def delta_net(key_heads: int, value_heads: int, key_dim: int, value_dim: int) -> RecurrentLayer:
    """A gated delta net: the convolution is over q, k and v."""
    channels, state = value_heads * value_dim, value_heads * value_dim * key_dim
    return RecurrentLayer(channels, state, 4, value_heads, key_heads, 2 * key_heads * key_dim, delta=True)


def kda(heads: int, dim: int) -> RecurrentLayer:
    """Kimi delta attention: every head has a q, a k and a v of its own."""
    return RecurrentLayer(3 * heads * dim, heads * dim * dim, 4, heads, delta=True)


#: Nemotron-3-Super: its config names no dtype of the state, so that vLLM takes fp32.
SUPER = CacheLayers(40, mamba2(128, 64, 128, 8), 8, kv_heads=2, head_dim=128, family="nemotron_h")
SUPER_64 = replace(SUPER, layer=mamba2(128, 64, 64, 8))
NANO = CacheLayers(23, mamba2(64, 64, 128, 8), 6, kv_heads=2, head_dim=128, family="nemotron_h")
_FP32 = (("mamba_ssm_dtype", "float32"),)
QWEN_27B = CacheLayers(
    48, delta_net(16, 48, 128, 128), 16, kv_heads=4, head_dim=256, family="qwen3_5_text", state_dtypes=_FP32
)
QWEN_4B = CacheLayers(
    24, delta_net(16, 32, 128, 128), 8, kv_heads=4, head_dim=256, family="qwen3_5_text", state_dtypes=_FP32
)
#: Kimi-Linear-48B-A3B: a token is one vector of 512 numbers and 64 rotated ones to all heads of its attention.
KIMI = CacheLayers(20, kda(32, 128), 7, latent=512 + 64, family="kimi_linear")
FALCON_H1 = CacheLayers(24, mamba2(48, 64, 256, 1), 24, kv_heads=2, head_dim=128, family="falcon_h1")


@st.composite
def layers(draw: st.DrawFn, attention: bool | None = None) -> CacheLayers:
    """Draw small models: Mamba2 or Mamba1 layers, and attention if it is not excluded."""
    groups, per_group, head_dim, state = (draw(st.integers(1, 4)) for _ in range(4))
    two = draw(st.booleans())
    layer = mamba2(groups * per_group, head_dim, state, groups) if two else RecurrentLayer(head_dim, head_dim * state)
    has = draw(st.booleans()) if attention is None else attention
    return CacheLayers(
        recurrent=draw(st.integers(1, 12)),
        layer=layer,
        attention=draw(st.integers(1, 12)) if has else 0,
        kv_heads=draw(st.integers(1, 3)) if has else 0,
        head_dim=draw(st.integers(1, 4)) if has else 0,
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        family="mamba2" if two else "mamba",
    )
