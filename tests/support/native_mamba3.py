"""Stand-in for mamba_ssm's Mamba3: its kernels need a GPU, its attributes do not.

Names, shapes and the recurrence are those of mamba_ssm 2.3.2; the code is our own: a loop over tokens, in fp64
where the model is, else in fp32. It serves training and decoding. R ranks (1 unless is_mimo), G groups, H heads,
P head dim, N states, S angles:

    h_t = a_t (h_{t-1} + (1 - l_t) dt_t k_{t-1} v_{t-1}) + l_t dt_t k_t v_t          y_t = q_t . h_t + D v_t
    k, q = B and C, normalised over N, plus a bias of the head, rotated by the sum of tanh(angle) pi dt up to t
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

States = tuple[
    torch.Tensor, ...
]  # angles (b, H, S), states (b, H, P, N), and of the last token k (b, R, H, N), x (b, H, P)


def wide(x: torch.Tensor) -> torch.Tensor:
    """Return x in fp32, or as it is in fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """RMS norm over the last dimension; with a gate z, before or after it, over groups of `group_size`."""

    def __init__(self, hidden_size: int, eps: float = 1e-5, group_size: int | None = None, norm_before_gate=True):
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.register_parameter("bias", None)

    def forward(self, x: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        gate = torch.ones(()) if z is None else F.silu(wide(z))
        rows = wide(x) if self.norm_before_gate else wide(x) * gate
        rows = rows.unflatten(-1, (-1, self.group_size or x.shape[-1]))
        rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + self.eps)
        out = rows.flatten(-2) * wide(self.weight)
        return (out * gate if self.norm_before_gate else out).to(x.dtype)


class Mamba3(nn.Module):
    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        expand: int = 2,
        headdim: int = 4,
        ngroups: int = 1,
        rope_fraction: float = 0.5,
        is_outproj_norm: bool = False,
        is_mimo: bool = False,
        mimo_rank: int = 2,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.d_state, self.expand, self.headdim = d_model, d_state, expand, headdim
        self.A_floor, self.chunk_size, self.layer_idx = 1e-4, 64, layer_idx
        self.is_outproj_norm, self.is_mimo, self.mimo_rank = is_outproj_norm, is_mimo, mimo_rank if is_mimo else 1
        self.d_inner = expand * d_model
        self.nheads, self.num_bc_heads = self.d_inner // headdim, ngroups
        self.rotary_dim_divisor = int(2 / rope_fraction)
        self.split_tensor_size = int(d_state * rope_fraction) // 2 * 2
        self.num_rope_angles = self.split_tensor_size // 2
        H, R, N, P = self.nheads, self.mimo_rank, d_state, headdim
        rows = 2 * self.d_inner + 2 * N * ngroups * R + 3 * H + self.num_rope_angles
        self.in_proj = nn.Linear(d_model, rows, bias=False)
        self.dt_bias, self.D = nn.Parameter(torch.zeros(H)), nn.Parameter(torch.ones(H))
        self.B_bias, self.C_bias = (nn.Parameter(torch.ones(H, R, N)) for _ in range(2))
        self.B_norm, self.C_norm = RMSNorm(N), RMSNorm(N)
        if is_mimo:
            self.mimo_x, self.mimo_z, self.mimo_o = (nn.Parameter(torch.ones(H, R, P)) for _ in range(3))
        if is_outproj_norm:
            self.norm = RMSNorm(self.d_inner, group_size=headdim)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def forward(self, u, seq_idx=None, cu_seqlens=None, inference_params=None):
        """Return the mixer's output for u (b, T, d_model), in the same shape."""
        assert seq_idx is cu_seqlens is None, "not in the stand-in"
        z, x, k, q, dt, decay, new, turns = self.scan_inputs(u)
        stored = self.states(len(u), inference_params)
        (phase, h, last_k, last_x), outputs = map(wide, stored), []
        for t in range(u.shape[1]):
            phase = phase + turns[:, t]
            k_t, q_t = (rotate(rows[:, t], phase, self.is_mimo) for rows in (k, q))  # (b, R, H, N)
            old = (dt * (1 - new))[:, t, :, None, None] * self.outer(last_x, last_k)
            h = decay[:, t, :, None, None] * (h + old) + (dt * new)[:, t, :, None, None] * self.outer(x[:, t], k_t)
            y = torch.einsum("bhpn,brhn->brhp", h, q_t) + wide(self.D)[:, None] * self.by_rank("mimo_x", x[:, t])
            outputs.append(y)
            last_k, last_x = k_t, x[:, t]
        for kept, value in zip(stored, (phase, h, last_k, last_x), strict=True):
            kept.copy_(value)
        y, z = torch.stack(outputs, 1), self.by_rank("mimo_z", z)  # (b, T, R, H, P)
        if self.is_outproj_norm:
            y = self.norm(y.flatten(-2), z.flatten(-2)).unflatten(-1, (self.nheads, self.headdim))
        else:
            y = y * F.silu(z)
        y = (y * wide(self.mimo_o).transpose(0, 1) if self.is_mimo else y).sum(2)  # (b, T, H, P)
        return self.out_proj(y.flatten(-2).to(u.dtype))

    def scan_inputs(self, u: torch.Tensor) -> States:
        """Return z, x (b, T, H, P), k, q (b, T, R, H, N), dt, decay, new (b, T, H), and turns (b, T, H, S)."""
        H, P, G, N, R = self.nheads, self.headdim, self.num_bc_heads, self.d_state, self.mimo_rank
        sizes = [self.d_inner, self.d_inner, R * G * N, R * G * N, H, H, H, self.num_rope_angles]
        z, x, B, C, dt, A, trap, angle = wide(self.in_proj(u)).split(sizes, -1)
        k, q = (
            norm(rows.unflatten(-1, (R, G, N))).repeat_interleave(H // G, 3) + wide(bias).transpose(0, 1)
            for rows, norm, bias in ((B, self.B_norm, self.B_bias), (C, self.C_norm, self.C_bias))
        )
        dt = F.softplus(dt + wide(self.dt_bias))
        rate = (A.clamp_min(0) + 1 / (1 - A.clamp_max(0))).clamp_min(self.A_floor)
        turns = math.pi * torch.tanh(angle)[:, :, None] * dt[..., None]
        return z.unflatten(-1, (H, P)), x.unflatten(-1, (H, P)), k, q, dt, torch.exp(-rate * dt), trap.sigmoid(), turns

    def by_rank(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Return x (..., H, P) for every rank: (..., R, H, P)."""
        return x[..., None, :, :] * wide(getattr(self, name)).transpose(0, 1) if self.is_mimo else x[..., None, :, :]

    def outer(self, x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Return what x (b, H, P) and k (b, R, H, N) write: (b, H, P, N)."""
        return torch.einsum("brhp,brhn->bhpn", self.by_rank("mimo_x", x), k)

    def states(self, batch: int, inference_params: Any) -> States:
        if inference_params is None:
            return self.allocate_inference_cache(batch, 0, dtype=wide(self.in_proj.weight[:0]).dtype)
        stored = inference_params.key_value_memory_dict
        if self.layer_idx not in stored:
            stored[self.layer_idx] = self.allocate_inference_cache(batch, 0)
        return stored[self.layer_idx]

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs) -> States:
        """Allocate the cache: angles and states are in fp32 in the original, whatever the dtype of the others."""
        H, P, N, R = self.nheads, self.headdim, self.d_state, self.mimo_rank
        weight = self.in_proj.weight
        kept = torch.promote_types(dtype or weight.dtype, torch.float32)
        shapes = [(H, self.num_rope_angles), (H, P, N), (R, H, N), (H, P)]
        kinds = [kept, kept, dtype or weight.dtype, dtype or weight.dtype]
        return tuple(
            torch.zeros(batch_size, *shape, device=weight.device, dtype=kind)
            for shape, kind in zip(shapes, kinds, strict=True)
        )


def rotate(rows: torch.Tensor, phase: torch.Tensor, halves: bool) -> torch.Tensor:
    """Rotate the first S pairs of rows (b, R, H, N) by phase (b, H, S): neighbours, or with `halves` n and n + N/2."""
    pairs = rows.unflatten(-1, (2, -1)) if halves else rows.unflatten(-1, (-1, 2)).transpose(-1, -2)  # (..., 2, N/2)
    turning, still = pairs.split([phase.shape[-1], pairs.shape[-1] - phase.shape[-1]], -1)
    (a, b), cos, sin = turning.unbind(-2), phase.cos()[:, None], phase.sin()[:, None]
    turned = torch.cat([torch.stack([a * cos - b * sin, a * sin + b * cos], -2), still], -1)
    return turned.flatten(-2) if halves else turned.transpose(-1, -2).flatten(-2)
