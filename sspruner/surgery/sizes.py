"""Sizes of a model, before a cut and predicted for a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from sspruner.graph.ssm_graph import SSMGraph
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import projections
from sspruner.surgery.predict import added_parameters, dropped_modules, removed_parameters, removed_state_bytes
from sspruner.surgery.project import added_by_projections
from sspruner.surgery.slice import rows_to_drop
from sspruner.units import as_bytes

if TYPE_CHECKING:
    from sspruner.recipes.parts import Limits


FP32 = 4  # bytes


@dataclass(frozen=True)
class Sizes:
    """Number of parameters; bytes of weights; bytes of recurrent and of convolution state per sequence."""

    parameters: int
    weight_bytes: int
    state_bytes: int
    conv_bytes: int

    def states(self, sequences: int) -> int:
        """Return the bytes of recurrent and convolution states of so many sequences."""
        return sequences * (self.state_bytes + self.conv_bytes)

    def exceeds(self, limits: Limits, dense: Sizes) -> str:
        """Return which size limit is exceeded, with the value, "" if none is. dense: the sizes of the uncut model."""
        if limits.state_bytes is not None and self.state_bytes > limits.state_bytes:
            return f"state-bytes {limits.state_bytes:,.0f}: {self.state_bytes:,} B of state per sequence"
        if limits.memory is not None and limits.max_batch is not None:
            total = self.weight_bytes + self.states(limits.max_batch)
            if total > limits.memory:
                return f"memory {limits.memory:,.0f}: {limits.max_batch} sequences take {total:,} B with the weights"
        if limits.state_memory is not None and limits.max_batch is not None:
            total = self.states(limits.max_batch)
            if total > limits.state_memory:
                states = f"the states of {limits.max_batch} sequences take {total:,} B"
                return f"state-memory {limits.state_memory:,.0f}: {states}"
        if limits.parameters is not None:
            limit = limits.parameters * (dense.parameters if limits.parameters <= 1 else 1)
            if self.parameters > limit:
                return f"params {limit:,.0f}: {self.parameters:,} parameters"
        return ""


def used(now: Sizes, limits: Limits, dense: Sizes) -> str:
    """Return how much of each limit of size is used, as text, "" without one. dense: the sizes of the uncut model."""
    parts = []
    if limits.state_bytes is not None:
        parts.append(f"state per sequence {as_bytes(now.state_bytes)} of {as_bytes(limits.state_bytes)} allowed")
    if limits.memory is not None and limits.max_batch is not None:
        total = now.weight_bytes + now.states(limits.max_batch)
        parts.append(
            f"{limits.max_batch} sequences and the weights {as_bytes(total)} of {as_bytes(limits.memory)} allowed"
        )
    if limits.state_memory is not None and limits.max_batch is not None:
        total = now.states(limits.max_batch)
        allowed = as_bytes(limits.state_memory)
        parts.append(f"states of {limits.max_batch} sequences {as_bytes(total)} of {allowed} allowed")
    if limits.parameters is not None:
        limit = limits.parameters * (dense.parameters if limits.parameters <= 1 else 1)
        parts.append(f"{now.parameters:,} of {limit:,.0f} parameters allowed")
    return ", ".join(parts)


def sizes(model: nn.Module, graph: SSMGraph, plan: Plan | None = None) -> Sizes:
    """Return the sizes of a model, or those that a plan would lead to, without cutting.

    Bytes of weights are exact if all weights have one dtype; the bases of projected states are fp32.
    """
    itemsize = next(model.parameters()).element_size()
    conv = _conv_values(model, graph, plan) * itemsize
    if plan is None:
        return Sizes(graph.parameters, graph.weight_bytes, graph.state_bytes, conv)
    biases = added_parameters(model, plan, graph) - added_by_projections(model, plan, graph)
    removed, bases = removed_parameters(model, plan, graph), _bases_left(model, graph, plan)
    return Sizes(
        graph.parameters - removed + biases + bases,
        graph.weight_bytes - (removed - biases) * itemsize + bases * FP32,
        graph.state_bytes - removed_state_bytes(plan, graph),
        conv,
    )


def _conv_values(model: nn.Module, graph: SSMGraph, plan: Plan | None) -> int:
    """Return the number of elements in the convolution states of one sequence; 0 for a mixer without a convolution."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    rows, dropped = (rows_to_drop(plan, graph), dropped_modules(plan, graph)) if plan else ({}, [])
    total = 0
    for site in graph.layers:
        name = f"{site.path}.conv1d.weight"
        if name in parameters and not _inside(site.path, dropped):
            channels, _, kernel = parameters[name].shape
            total += (channels - len(rows.get(name, {}).get((0,), ()))) * kernel
    return total


def _bases_left(model: nn.Module, graph: SSMGraph, plan: Plan) -> int:
    """Return the number of parameters that projections add in mixers and B/C groups that are kept."""
    dropped, total = dropped_modules(plan, graph), 0
    for name, projection in projections(plan.groups).items():
        layer = graph.groups[name].layer
        if not _inside(layer, dropped):
            added = added_by_projections(model, Plan({name: projection}), graph)
            sets = plan.groups.get(f"{layer}:group")
            total += added * sets.after // sets.before if sets else added  # an integer: each group has as many
    return total


def _inside(path: str, modules: Sequence[str]) -> bool:
    return any(f"{path}.".startswith(f"{module}.") for module in modules)
