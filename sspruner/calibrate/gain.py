"""First-order gain from the scan's output to the mixer's output, through gate, norm and out_proj."""

from __future__ import annotations

import torch


def output_weights(
    y: torch.Tensor,
    gate: torch.Tensor,
    out_proj: torch.Tensor,
    norm: torch.Tensor | None = None,
    given: torch.Tensor | None = None,
    groups: int = 1,
) -> torch.Tensor:
    """Compute w_t[k,p] = gate_t[k,p]^2 rms_t^-2 norm[k,p]^2 ||out_proj[:,(k,p)]||^2: fp32 (b, T, H, P), like y.

    This is the squared gain from a channel of y to the mixer's output, with the norm's divisor held constant and
    without products between channels. Source: docs/scorers/ghost.md.

    y         fp32 (b, T, H, P): the scan's output
    gate      (b, T, D), D = H * P: the gate's factor, silu(z) in most families
    out_proj  (hidden size, D)
    norm      (D,): the norm's weight, None where there is no norm; then rms is 1
    given     (b, T, D): input of out_proj, None where there is no norm
    groups    number of runs of channels that the norm averages over separately
    """
    gain = gate.float()  # (b, T, D)
    if norm is not None and given is not None:
        gain = gain * norm
        # In either order of gate and norm out_proj's input is y * gain / rms, with one rms for each group.
        before = (y.flatten(2) * gain).view(*y.shape[:2], groups, -1)  # (b, T, groups, D / groups)
        energy = before.square().sum(-1, keepdim=True)
        scale = (before * given.view_as(before)).sum(-1, keepdim=True) / energy.where(energy > 0, 1.0)
        gain = (gain.view_as(before) * scale).flatten(2)
    return (gain.square() * out_proj.square().sum(0)).view_as(y)
