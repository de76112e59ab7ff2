"""Projections: reduce a mixer's state to fewer coordinates, as a slice (size k) or as a mask (size N, rank k)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sspruner.graph.layout import ENCODE
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.graph.trace import trace
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Basis, Projection, projections
from sspruner.runtime.projected_state import project_state, unproject_state


def project_states(model: nn.Module, plan: Plan, graph: SSMGraph) -> tuple[Plan, SSMGraph]:
    """Install the projected states of a plan. Returns the rest of the plan, and the graph for it."""
    projected = projections(plan.groups)
    if not projected:
        return plan, graph
    for name, projection in projected.items():
        install(model, graph.groups[name].layer, sliced(basis_of(model, graph.groups[name].layer), projection))
    rest = {name: r for name, r in plan.groups.items() if name not in projected}
    return Plan(rest, plan.model, plan.made_by, plan.elements, plan.updates), trace(model)


def mask_state(model: nn.Module, layer: str, projection: Projection) -> Basis | None:
    """Apply a projection's projector at run time; the state keeps its size. Returns the previous basis."""
    before = basis_of(model, layer)
    install(model, layer, masked(before, projection))
    return before


def sliced(held: Basis | None, projection: Projection) -> Basis:
    """Return encode (G, k, N) and decode (G, N, k) of the smaller state, composed with the basis `held`, if any."""
    if held is None:
        return projection.encode, projection.decode
    (encode, decode), wide = held, torch.float64
    new, read = projection.encode.to(encode.device, wide), projection.decode.to(encode.device, wide)
    return (new @ encode.to(wide)).float(), (decode.to(wide) @ read).float()


def masked(held: Basis | None, projection: Projection) -> Basis:
    """Return encode and decode of a state of full size, in which the coordinates that the slice lacks are zero."""
    encode, decode = sliced(held, projection)
    lacking = projection.before - projection.after
    return F.pad(encode, (0, 0, 0, lacking)), F.pad(decode, (0, lacking))


def install(model: nn.Module, layer: str, basis: Basis | None) -> None:
    """Set or remove the basis of the state of the mixer at a path."""
    mixer: Any = model.get_submodule(layer)
    if basis is None:
        unproject_state(mixer)
        return
    to = {
        "device": next(mixer.parameters()).device,
        "copy": True,
        "memory_format": torch.contiguous_format,
    }  # like a loaded model
    encode, decode = (part.to(**to) for part in basis)
    project_state(mixer, encode, decode)


def basis_of(model: nn.Module, layer: str) -> Basis | None:
    """Return encode and decode of the projected state of the mixer at a path; None if its state has no basis."""
    mixer: Any = model.get_submodule(layer)
    return (mixer.state_encode.data, mixer.state_decode.data) if hasattr(mixer, ENCODE) else None


def added_by_projections(model: nn.Module, plan: Plan, graph: SSMGraph) -> int:
    """Return the number of parameters that a plan's projections add; it may be negative for a state with a basis."""
    total = 0
    for name, projection in projections(plan.groups).items():
        basis = basis_of(model, graph.groups[name].layer)
        rows = projection.before if basis is None else basis[0].shape[2]
        total += 2 * projection.sets * projection.after * rows - (0 if basis is None else 2 * basis[0].numel())
    return total
