"""Faster decode step on the CPU for Mamba2-type mixers of transformers, stock or with a projected state.

Without kernels, transformers repeats B and C over heads, builds the update as a tensor of the state's size in several
passes, and copies the result into the cache. Here the state is updated in place, a few sequences at a time, so that
they stay in the processor's cache, and is read by one matrix-vector product per group. Sums are in fp32 or wider, so
results differ by rounding only.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sspruner.runtime.projected_state import check_no_cache, coordinates

ALONE = 2**16  # bytes: a sequence with a larger state is updated alone, since torch is faster on fewer dimensions
SLICE = 2**20  # bytes of smaller states that are updated at once

BEFORE = "_forward_before"  # attribute: the instance's previous forward, None for that of its class


def can_step(module: nn.Module) -> bool:
    """Return whether it is a Mamba2-type mixer of transformers whose weights are not moved by hooks."""
    stock = sys.modules.get(type(module).__module__)
    known = hasattr(stock, "mamba2_selective_state_update") and hasattr(module, "A_log")
    return known and not hasattr(getattr(module, "conv1d", None), "_hf_hook")


def install_step(mixer: Any) -> None:
    """Install the faster step in a mixer. Does nothing if it is installed."""
    if not has_step(mixer):
        setattr(mixer, BEFORE, vars(mixer).get("forward"))
        mixer.forward = partial(_forward, mixer)  # not a bound method: those of other classes cannot be pickled


def remove_step(mixer: Any) -> None:
    """Undo `install_step`: restore the mixer's previous forward."""
    if has_step(mixer):
        before = getattr(mixer, BEFORE)
        if before is None:
            del mixer.forward
        else:
            mixer.forward = before
    vars(mixer).pop(BEFORE, None)


def has_step(mixer: Any) -> bool:
    """Return whether the faster step is installed; a projection made after it installs another forward."""
    return getattr(vars(mixer).get("forward"), "func", None) is _forward


def _forward(
    self: Any, hidden_states: torch.Tensor, *args: Any, attention_mask: Any = None, **kwargs: Any
) -> torch.Tensor:
    """Run the faster step for one token of each sequence and a filled cache, else the previous forward.

    hidden_states: (b, T, D). The cache is given as `cache` since transformers 5.24, and as `cache_params` before.
    """
    named = [name for name in ("cache", "cache_params") if kwargs.get(name) is not None]
    check_no_cache({name: value for name, value in kwargs.items() if name not in named})
    cache = kwargs[named[0]] if named else None
    if not args and _is_step(self, hidden_states, cache):
        return _step(self, hidden_states, cache, attention_mask)
    before = getattr(self, BEFORE) or partial(type(self).forward, self)
    out: torch.Tensor = before(hidden_states, *args, attention_mask=attention_mask, **kwargs)
    return out


def _is_step(mixer: Any, hidden_states: torch.Tensor, cache: Any) -> bool:
    if cache is None or hidden_states.shape[1] != 1 or hidden_states.device.type != "cpu":
        return False
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or cache.is_recording_past(mixer.layer_idx):
        return False
    state = cache.get_recurrent_state(mixer.layer_idx, state_idx=0)
    return state is not None and state.is_contiguous()


def _step(self: Any, hidden_states: torch.Tensor, cache: Any, attention_mask: Any) -> torch.Tensor:
    """Compute the mixer's output for one token of each sequence, (b, 1, width), and advance the cache."""
    stock = sys.modules[type(self).__module__]
    b, H, P, G = hidden_states.shape[0], self.num_heads, self.head_dim, self.n_groups
    dtype, rms_norm = hidden_states.dtype, getattr(self, "mamba_rms_norm", True)
    hidden_states = stock.apply_mask_to_padding_states(hidden_states, attention_mask)
    if hasattr(self, "mup_vector"):  # Falcon-H1
        rows = self.in_proj(hidden_states * self.ssm_in_multiplier) * self.mup_vector
    else:
        rows = self.in_proj(hidden_states)  # (b, 1, rows)
    gate, xBC, dt = rows.split([H * P, self.conv_dim, H], dim=-1)
    xBC = _convolved(xBC[:, 0], cache.get_conv_state(self.layer_idx, state_idx=0), self.conv1d)
    xBC = stock.apply_mask_to_padding_states(self.act(xBC)[:, None], attention_mask)
    size = (self.conv_dim - H * P) // 2
    x, B, C = xBC.split([H * P, size, size], dim=-1)
    if hasattr(self, "state_encode"):
        B, C = coordinates(B, self.state_encode), coordinates(C, self.state_decode.transpose(1, 2))
    state = cache.get_recurrent_state(self.layer_idx, state_idx=0)
    dt = F.softplus(dt[:, 0] + self.dt_bias.to(dt.dtype))  # (b, H)
    A = -torch.exp(self.A_log.float())
    y = update_state(state, x.view(b, H, P), dt, A, B.view(b, G, -1), C.view(b, G, -1), self.D).to(dtype).view(b, 1, -1)
    y = self.norm(y, gate) if rms_norm else y * F.silu(gate)
    return self.out_proj(y.to(dtype))  # type: ignore[no-any-return]


def _convolved(column: torch.Tensor, conv_state: torch.Tensor, conv1d: nn.Conv1d) -> torch.Tensor:
    """Compute the newest output, (b, channels), of the depthwise convolution before activation; advance its state."""
    window = torch.cat([conv_state, column[..., None].to(conv_state.dtype)], dim=-1)  # (b, channels, kernel + 1)
    conv_state.copy_(window[..., -conv_state.shape[-1] :])
    weight = conv1d.weight[:, 0]
    wide = torch.promote_types(weight.dtype, torch.float32)
    out = (window[..., -weight.shape[-1] :].to(wide) * weight.to(wide)).sum(-1)
    return (out if conv1d.bias is None else out + conv1d.bias.to(wide)).to(column.dtype)


def update_state(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
) -> torch.Tensor:
    """Update h = exp(dt A) h + dt x (outer) B in place. Returns C . h + D x, (b, H, P), in the state's dtype.

    state: (b, H, P, N), contiguous. x: (b, H, P), dt: (b, H), A and D: (H,), B and C: (b, G, N).
    """
    b, H, P, N = state.shape
    G, wide = B.shape[1], state.dtype
    x, dt, B, C = x.to(wide), dt.to(wide), B.to(wide), C.to(wide)
    decay = torch.exp(dt * A.to(wide))[..., None, None]  # (b, H, 1, 1)
    grouped = (dt[..., None] * x).view(b, G, H // G * P, 1)
    y = x.new_empty(b * G, H // G * P, 1)
    size = H * P * N * state.element_size()
    at_once = 1 if size >= ALONE else max(1, SLICE // size)
    for i in range(0, b, at_once):
        part, n = state[i : i + at_once], min(at_once, b - i)
        part.mul_(decay[i : i + n])
        part.view(n, G, H // G * P, N).addcmul_(grouped[i : i + n], B[i : i + n, :, None])
        read = C[i : i + n].reshape(n * G, N, 1)
        torch.bmm(part.view(n * G, H // G * P, N), read, out=y[i * G : (i + n) * G])
    return y.view(b, H, P) + x * D.to(wide)[:, None]
