"""Models and modules to compare with torch-pruning."""

from __future__ import annotations

from typing import Any

from torch import nn

#: Structures whose hidden size no other dimension shares.
DISTINCT: dict[str, dict[str, Any]] = {
    "mamba2": {"heads": 3, "channels": 8},
    "mamba": {"hidden": 24},
    "falcon_mamba": {"hidden": 24},
    "zamba2": {"heads": 3, "channels": 8},
    "bamba": {"heads": 3, "channels": 8},
    "granitemoehybrid": {"heads": 3, "channels": 8},
    "falcon_h1": {"hidden_size": 28},
    "nemotron_h": {"moe_latent_size": None},  # with a latent size, see below
    "jamba": {"hidden": 24},
    "zamba": {"heads": 4, "channels": 11},
}


def modules(model: nn.Module, *names: str) -> list[list[Any]]:
    """Return the modules that have Linears of these names; modules that share parameters together."""
    found: dict[nn.Parameter, list[Any]] = {}
    for m in model.modules():
        if all(isinstance(getattr(m, name, None), nn.Linear) for name in names):
            found.setdefault(getattr(m, names[0]).weight, []).append(m)
    return list(found.values())
