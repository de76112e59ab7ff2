"""All parameters of a model as one vector."""

from __future__ import annotations

from typing import Any

import torch


def flat(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().flatten() for name, p in model.named_parameters()}
