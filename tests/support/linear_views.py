"""The scorer's view of a single linear layer."""

from __future__ import annotations

import torch
from torch import nn

from sspruner.calibrate.view import Observation, SSMView
from sspruner.graph.group import DependencyGroup


def linear_view(weight: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None = None) -> SSMView:
    """Return a view of a linear layer on the axis weight. x: (b, T, in)."""
    model = nn.ModuleDict({"lin": nn.Linear(weight.shape[1], weight.shape[0], bias=False)})
    model["lin"].weight.data = weight
    mask = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    group = DependencyGroup("lin", "weight", *weight.shape, (), tensor="lin.weight")
    return SSMView(Observation(model, "lin", mask, hidden=x), group)
