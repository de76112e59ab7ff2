"""Check that a model's weights are finite."""

from __future__ import annotations

import torch
from torch import nn

from sspruner.compute.device import in_turn
from sspruner.errors import ModelError

CHUNK = 2**24  # number of values checked at once


def check_finite(model: nn.Module, where: str = "") -> None:
    """Raise ModelError that names the first parameter with a NaN or infinite value. where: path of the model."""
    prefix = f"model {where}: " if where else ""
    for name, p in in_turn(model):
        bad = sum(int((~part.isfinite()).sum()) for part in torch.split(p.detach().flatten(), CHUNK))
        if bad:
            raise ModelError(
                f"{prefix}{name}: {bad} of {p.numel()} weights are NaN or infinite; the checkpoint is damaged"
            )
