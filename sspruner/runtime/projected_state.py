"""Mixer with a projected state: k coordinates instead of the N rows of B and C, or of a delta rule's keys and queries.

B and C are projected after convolution and SiLU, and the state has size k from there on:

    B' = B encode^T        C' = C decode        encode (G, k, N), decode (G, N, k)

Keys and queries of a gated delta net are projected after their l2 norm, and not normalised again: k' for both the write
and the erase, q' for the read. The query's factor stays 1/sqrt(N).

The scan and the decode step are those of the model's own module, CUDA kernels included. This file is self-contained:
an exported model has a copy beside its weights and runs without sspruner.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.integrations.accelerate import force_accelerate_hooks


def project_state(mixer: Any, encode: torch.Tensor, decode: torch.Tensor) -> None:
    """Project a mixer's state to other coordinates. encode: (G, k, N), decode: (G, N, k), fp32 or wider.

    mixer: of mamba2, zamba2, bamba, granitemoehybrid, falcon_h1 or nemotron_h in transformers, or a gated delta net of
    qwen3_next, qwen3_5, qwen3_5_moe, qwen4_exp, olmo_hybrid or lara_mini. encode and decode become its parameters
    `state_encode` and `state_decode`, without a copy.
    """
    requires_grad = next(mixer.parameters()).requires_grad
    mixer.state_encode = nn.Parameter(encode, requires_grad=requires_grad)
    mixer.state_decode = nn.Parameter(decode, requires_grad=requires_grad)
    forward = _delta_forward if hasattr(mixer, "head_k_dim") else _forward
    mixer.forward = partial(forward, mixer)  # not a bound method: those of other classes cannot be pickled


def unproject_state(mixer: Any) -> None:
    """Undo `project_state`: restore the forward of the mixer's class."""
    del mixer.forward, mixer.state_encode, mixer.state_decode


def check_no_cache(kwargs: dict[str, Any]) -> None:
    """Raise TypeError for a cache under a name that is not known here: without it, decoding would have no state."""
    for name, value in kwargs.items():
        if hasattr(value, "update_recurrent_state"):
            raise TypeError(f"a cache under the name {name!r}, which this version of the mixer's forward does not take")


def coordinates(rows: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Transform the vectors of all groups: rows (b, T, G * N), basis (G, k, N) -> (b, T, G, k), in the dtype of rows.

    The product is computed in fp32 or wider, since terms may nearly cancel.
    """
    wide = torch.promote_types(torch.promote_types(rows.dtype, basis.dtype), torch.float32)
    parts = rows.view(*rows.shape[:-1], basis.shape[0], basis.shape[2])  # (b, T, G, N)
    return torch.einsum("btgn,gkn->btgk", parts.to(wide), basis.to(wide)).to(rows.dtype)


def _projected(self: Any, hidden_states: torch.Tensor) -> Any:
    """Return the rows of in_proj, (b, T, rows); Falcon-H1 scales them."""
    if hasattr(self, "mup_vector"):
        return self.in_proj(hidden_states * self.ssm_in_multiplier) * self.mup_vector
    return self.in_proj(hidden_states)


@force_accelerate_hooks("conv1d")  # type: ignore[untyped-decorator]
def _forward(
    self: Any, hidden_states: torch.Tensor, cache_params: Any = None, attention_mask: Any = None, **kwargs: Any
) -> torch.Tensor:
    """Compute the forward pass of the six mixers with a projected state. hidden_states: (b, T, hidden size)."""
    cache_params = kwargs.pop("cache", None) if cache_params is None else cache_params  # its name since 5.24
    check_no_cache(kwargs)
    stock = sys.modules[type(self).__module__]
    b, T, _ = hidden_states.shape
    H, P, G, k = self.num_heads, self.head_dim, self.n_groups, self.state_encode.shape[1]
    dtype, rms_norm = hidden_states.dtype, getattr(self, "mamba_rms_norm", True)
    conv_state = recurrent_state = None
    if cache_params is not None:
        conv_state = cache_params.get_conv_state(self.layer_idx, state_idx=0)
        recurrent_state = cache_params.get_recurrent_state(self.layer_idx, state_idx=0)
    hidden_states = stock.apply_mask_to_padding_states(hidden_states, attention_mask)
    gate, xBC, dt = _projected(self, hidden_states).split([H * P, self.conv_dim, H], dim=-1)

    xBC, weight, bias = xBC.transpose(1, 2), self.conv1d.weight.squeeze(1), self.conv1d.bias  # (b, channels, T)
    if conv_state is not None and T == 1 and not cache_params.is_recording_past(self.layer_idx):
        xBC = stock.causal_conv1d_update(xBC, conv_state, weight, bias, activation=self.activation)
    else:
        if cache_params is not None:
            xBC = cache_params.update_conv_state(xBC, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
        xBC = stock.causal_conv1d_fn(xBC, weight, bias, activation=self.activation, **kwargs)[..., -T:]
    xBC = stock.apply_mask_to_padding_states(xBC.transpose(1, 2), attention_mask)
    x, B, C = xBC.split([H * P, (self.conv_dim - H * P) // 2, (self.conv_dim - H * P) // 2], dim=-1)
    B, C = coordinates(B, self.state_encode), coordinates(C, self.state_decode.transpose(1, 2))  # (b, T, G, k)

    A = -torch.exp(self.A_log.float())
    if recurrent_state is not None and T == 1:
        y = stock.mamba2_selective_state_update(
            recurrent_state,
            x.view(b, H, P),
            dt.transpose(1, 2).expand(-1, -1, P),
            A[:, None, None].expand(-1, P, k),
            B.view(b, G, k),
            C.view(b, G, k),
            self.D[:, None].expand(-1, P),
            z=None if rms_norm else gate.view(b, H, P),
            dt_bias=self.dt_bias[:, None].expand(-1, P),
            dt_softplus=True,
            **kwargs,
        ).view(b, 1, H * P)
        gated = not rms_norm
    else:
        scanned = stock.mamba2_chunk_scan(
            x.view(b, T, H, P),
            dt,
            A,
            B,
            C,
            chunk_size=self.chunk_size,
            D=self.D,
            z=None,
            return_final_states=cache_params is not None,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            initial_states=recurrent_state,
            dt_limit=self.time_step_limit,
            **kwargs,
        )
        if cache_params is not None:
            scanned, final_state = scanned
            cache_params.update_recurrent_state(final_state, layer_idx=self.layer_idx)
        y, gated = scanned.reshape(b, T, -1), False
    if rms_norm:
        y = self.norm(y, gate)
    elif not gated:
        y = y * nn.functional.silu(gate)
    return self.out_proj(y.to(dtype))  # type: ignore[no-any-return]


def delta_rows(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return a gated delta net's projections: q, k and v (b, T, channels), z (b, T, H * V), b and a (b, T, H)."""
    if hasattr(self, "in_proj_qkvz"):
        q, k, v, z, b, a = self.fix_query_key_value_ordering(
            self.in_proj_qkvz(hidden_states), self.in_proj_ba(hidden_states)
        )
        return torch.cat([part.flatten(2) for part in (q, k, v)], dim=-1), z.flatten(2), b, a
    if hasattr(self, "in_proj_qkv"):
        parts = (self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a)
        return tuple(part(hidden_states) for part in parts)
    qkv = torch.cat([part(hidden_states) for part in (self.q_proj, self.k_proj, self.v_proj)], dim=-1)
    return qkv, self.g_proj(hidden_states), self.b_proj(hidden_states), self.a_proj(hidden_states)


@force_accelerate_hooks("conv1d")  # type: ignore[untyped-decorator]
def _delta_forward(
    self: Any, hidden_states: torch.Tensor, cache_params: Any = None, attention_mask: Any = None, **kwargs: Any
) -> torch.Tensor:
    """Compute the forward pass of the gated delta nets with a projected state. hidden_states: (b, T, hidden size)."""
    cache_params = kwargs.pop("cache", None) if cache_params is None else cache_params  # its name since 5.24
    check_no_cache(kwargs)
    stock = sys.modules[type(self).__module__]
    b, T, _ = hidden_states.shape
    K, V, size = self.head_k_dim, self.head_v_dim, self.state_encode.shape[1]
    conv_state = recurrent_state = None
    if cache_params is not None:
        conv_state = cache_params.get_conv_state(self.layer_idx, state_idx=0)
        recurrent_state = cache_params.get_recurrent_state(self.layer_idx, state_idx=0)
    hidden_states = stock.apply_mask_to_padding_states(hidden_states, attention_mask)
    qkv, gate, write, rate = delta_rows(self, hidden_states)

    qkv, weight = qkv.transpose(1, 2), self.conv1d.weight.squeeze(1)  # (b, channels, T)
    if conv_state is not None and T == 1 and not cache_params.is_recording_past(self.layer_idx):
        qkv = stock.causal_conv1d_update(qkv, conv_state, weight, self.conv1d.bias, self.activation)
    else:
        if cache_params is not None:
            qkv = cache_params.update_conv_state(qkv, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
        qkv = stock.causal_conv1d_fn(qkv, weight, self.conv1d.bias, activation=self.activation, **kwargs)[..., -T:]
    q, k, v = qkv.transpose(1, 2).split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
    q, k = (stock.l2norm(part.reshape(b, T, -1, K).float()).flatten(2) for part in (q, k))
    q = coordinates(q, self.state_decode.transpose(1, 2)) * (size / K) ** 0.5  # the kernel divides by sqrt(size)
    k = coordinates(k, self.state_encode)  # (b, T, Hk, size)

    beta = write.sigmoid() * (2.0 if getattr(self, "allow_neg_eigval", False) else 1.0)
    decay = -self.A_log.float().exp() * nn.functional.softplus(rate.float() + self.dt_bias)
    one = recurrent_state is not None and T == 1
    rule = stock.torch_recurrent_gated_delta_rule if one else stock.torch_chunk_gated_delta_rule
    y, last = rule(
        q.to(v.dtype),
        k.to(v.dtype),
        v.reshape(b, T, -1, V),
        g=decay,
        beta=beta,
        initial_state=recurrent_state,
        output_final_state=cache_params is not None,
        use_qk_l2norm_in_kernel=False,
        cu_seqlens=kwargs.pop("cu_seq_lens_q", None),
        **kwargs,
    )
    if cache_params is not None:
        cache_params.update_recurrent_state(last, self.layer_idx)
    norm, out = (self.o_norm, self.o_proj) if hasattr(self, "o_norm") else (self.norm, self.out_proj)
    y = norm(y.reshape(-1, V), gate.reshape(-1, V)).reshape(b, T, -1)
    return out(y)  # type: ignore[no-any-return]
