"""Plans that project the state of every layer."""

from __future__ import annotations

import torch

from sspruner.graph.ssm_graph import SSMGraph
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Projection
from sspruner.testing.plans import random_projection
from support.family_plans import DELTA

PROJECTED = ("mamba2", "zamba2", "bamba", "granitemoehybrid", "falcon_h1", "nemotron_h")
ANY_BASIS = (*PROJECTED, *DELTA)  # a delta rule keeps its function in an orthogonal basis alone


def projection(sets: int, before: int, after: int, seed: int = 0) -> Projection:
    return random_projection(sets, before, after, torch.Generator().manual_seed(seed))


def orthogonal(sets: int, before: int, after: int, seed: int = 0) -> Projection:
    """Return a projection on some directions of an orthogonal basis, another one for each set."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(sets, before, before, generator=generator, dtype=torch.float64)).Q.float()
    return Projection(basis.mT[:, :after].contiguous(), basis[:, :, :after].contiguous())


def every_state(graph: SSMGraph, part: float = 0.5, seed: int = 0) -> Plan:
    """Return a plan that projects the states of all layers on random directions."""
    groups = graph.on_axis("state")
    sizes = {n: max(1, int(g.units * part)) for n, g in groups.items()}
    return Plan({n: projection(g.groups, g.units, sizes[n], seed + i) for i, (n, g) in enumerate(groups.items())})
