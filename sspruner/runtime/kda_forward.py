"""Forward of a KDA mixer whose heads have more key channels than value channels, or fewer.

The stock classes have one number for both. This is their forward with two, for kimi_linear, bailing_hybrid and
glm5_next: the kernels, the gates and the norm are those of the model's own module. This file is self-contained: an
exported model has a copy beside its weights and runs without sspruner.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from transformers.integrations.accelerate import force_accelerate_hooks


def fit_forward(mixer: Any) -> None:
    """Replace the forward of a mixer whose q and v differ in size, and give one whose sizes agree its class's again."""
    if not hasattr(mixer, "forget_gate"):
        return
    if len(mixer.q_proj.weight) == len(mixer.v_proj.weight):
        if is_fitted(mixer):
            del mixer.forward
    elif not is_fitted(mixer):
        mixer.forward = partial(_kda_forward, mixer)  # not a bound method: those of other classes cannot be pickled


def is_fitted(mixer: Any) -> bool:
    """Return whether `fit_forward` has replaced the forward of a module."""
    replaced = getattr(vars(mixer).get("forward"), "func", None)
    return bool(getattr(replaced, "__name__", "") == _kda_forward.__name__)


def gate_of(mixer: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Return the gate of the norm after the scan, before its activation: (b, T, H * V)."""
    if hasattr(mixer, "g_proj"):
        return mixer.g_proj(hidden_states)  # type: ignore[no-any-return]
    return mixer.g_b_proj(mixer.g_a_proj(hidden_states))  # type: ignore[no-any-return]


@force_accelerate_hooks("conv1d")  # type: ignore[untyped-decorator]
def _kda_forward(
    self: Any, hidden_states: torch.Tensor, cache_params: Any = None, attention_mask: Any = None, **kwargs: Any
) -> torch.Tensor:
    """Compute the forward pass of the three mixers. hidden_states: (b, T, hidden size)."""
    cache = kwargs.pop("cache", None) if cache_params is None else cache_params  # its name since 5.24
    for name, value in kwargs.items():
        if hasattr(value, "update_recurrent_state"):
            raise TypeError(f"a cache under the name {name!r}, which this version of the mixer's forward does not take")
    stock = sys.modules[type(self).__module__]
    hidden_states = stock.apply_mask_to_padding_states(hidden_states, attention_mask)
    b, T, _ = hidden_states.shape
    conv_state = recurrent_state = None
    if cache is not None:
        conv_state = cache.get_conv_state(self.layer_idx, state_idx=0)
        recurrent_state = cache.get_recurrent_state(self.layer_idx, state_idx=0)
    parts = [self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)]
    mixed, weight = torch.cat(parts, -1).transpose(1, 2), self.conv1d.weight.squeeze(1)  # (b, channels, T)
    if conv_state is not None and T == 1:
        mixed = stock.causal_conv1d_update(mixed, conv_state, weight, self.conv1d.bias, activation=self.activation)
    else:
        if cache is not None:
            mixed = cache.update_conv_state(mixed, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
        mixed = stock.causal_conv1d_fn(mixed, weight, self.conv1d.bias, activation=self.activation, **kwargs)[..., -T:]
    split = mixed.transpose(1, 2).split([part.shape[-1] for part in parts], dim=-1)
    q, k, v = (part.reshape(b, T, self.num_heads, -1) for part in split)  # (b, T, H, K), K and V
    one_step = recurrent_state is not None and T == 1
    scan = stock.recurrent_kimi_delta_attention if one_step else stock.chunk_kimi_delta_attention
    y, state = scan(
        q,
        k,
        v,
        g=self.forget_gate(hidden_states),
        beta=torch.sigmoid(self.b_proj(hidden_states)),
        initial_state=recurrent_state,
        output_final_state=cache is not None,
        use_qk_l2norm_in_kernel=True,
        **kwargs,
    )  # (b, T, H, V), (b, H, K, V)
    if cache is not None:
        cache.update_recurrent_state(state.to(torch.float32), self.layer_idx)
    y = self.o_norm(y, gate_of(self, hidden_states).view(y.shape)).reshape(b, T, -1)
    return self.o_proj(y)  # type: ignore[no-any-return]
