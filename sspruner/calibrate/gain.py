"""What the rest of a mixer makes of a change of its scan's output: gate, norm and out_proj, to first order."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def output_weights(
    y: torch.Tensor,
    z: torch.Tensor,
    out_proj: torch.Tensor,
    norm: torch.Tensor | None = None,
    given: torch.Tensor | None = None,
    groups: int = 1,
) -> torch.Tensor:
    """w_t[k,p] = silu(z_t[k,p])^2 rms_t^-2 norm[k,p]^2 ||out_proj[:,(k,p)]||^2: fp32 (b, T, H, P), as y.

    The squared gain from a channel of y to the mixer's output, with what the norm divides by held at its value and
    without products between channels. y: fp32 (b, T, H, P), z: (b, T, D), D = H * P, out_proj: (hidden size, D), norm:
    (D,) its weight, given: (b, T, D), what out_proj is given, both None where there is no norm; then rms is 1. groups:
    over how many runs of channels the norm goes. Source: docs/scorers/ghost.md.
    """
    gain = F.silu(z.float())  # (b, T, D)
    if norm is not None and given is not None:
        gain = gain * norm
        # In either order of gate and norm what out_proj is given is y * gain / rms, with one rms for each group.
        before = (y.flatten(2) * gain).view(*y.shape[:2], groups, -1)  # (b, T, groups, D / groups)
        energy = before.square().sum(-1, keepdim=True)
        scale = (before * given.view_as(before)).sum(-1, keepdim=True) / energy.where(energy > 0, 1.0)
        gain = (gain.view_as(before) * scale).flatten(2)
    return (gain.square() * out_proj.square().sum(0)).view_as(y)
