"""Gains: what a smaller state, fewer heads, a state in eight bits, or a plan can gain at decode, from bytes alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sspruner.benchmarking.footprint import Footprint, footprint
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Selection
from sspruner.surgery.apply import apply_sizes

HALF, NARROW, BOTH, PLAN = "half of the state", "states in int8", "half of the state in int8", "the plan"
EIGHT_BITS = "int8"


@dataclass(frozen=True)
class Gains:
    """A model as it is, and smaller in several ways: what one decode step moves, and how much faster it can be.

    dense   the model as it is
    cuts    what makes it smaller -> the model after that
    batch   sequences in a step
    memory  bytes of memory for the weights and the caches, None if unknown
    """

    dense: Footprint
    cuts: Mapping[str, Footprint]
    batch: int
    memory: float | None = None

    @property
    def shares(self) -> dict[str, float]:
        """Return fractions of a step's bytes by what is moved: weights, states, KV cache."""
        parts = self.dense.step_parts(self.batch)
        return {name: part / sum(parts.values()) for name, part in parts.items()}

    @property
    def largest(self) -> str:
        """Return what most bytes of a step are: weights, states or KV cache."""
        return max(self.shares, key=self.shares.__getitem__)

    @property
    def halved(self) -> float:
        """Return how many times as fast a step can be if the largest part has half of its bytes."""
        return 1 / (1 - self.shares[self.largest] / 2)

    def times(self, name: str, batch: int) -> float:
        """Return how many times as fast a step of `batch` sequences can be, if memory traffic is the only cost."""
        return self.dense.step_bytes(batch) / self.cuts[name].step_bytes(batch)

    def limit(self, name: str) -> float:
        """Return what `times` tends to with ever more sequences."""
        return self.dense.sequence_step_bytes / self.cuts[name].sequence_step_bytes

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as a JSON object."""
        return {
            "batch": self.batch,
            "context": self.dense.context,
            "state_dtype": self.dense.state_dtype,
            "step_bytes": self.dense.step_parts(self.batch),
            "times_as_fast_at_most": {
                name: {"batch_1": self.times(name, 1), "batch": self.times(name, self.batch), "limit": self.limit(name)}
                for name in self.cuts
            },
        }


def gains(model: Any, graph: SSMGraph, dense: Footprint, cut: Footprint | None, **how: Any) -> Gains:
    """Return the gains of a plan, or without one of half of the state; each also with states in int8.

    model: on the meta device. cut: the footprint after the plan. how: batch and memory of `Gains`.
    """
    smaller = cut or kept(model, graph, "state", 0.5, dense)
    cuts = {} if smaller is None else {PLAN if cut else HALF: smaller}
    cuts |= {} if cut else {NARROW: dense.stored(EIGHT_BITS)}
    cuts |= {} if smaller is None else {f"{PLAN} and {NARROW}" if cut else BOTH: smaller.stored(EIGHT_BITS)}
    return Gains(dense, cuts, **how)


def kept(model: Any, graph: SSMGraph, axis: str, part: float, dense: Footprint) -> Footprint | None:
    """Return the footprint of a model that keeps this part of an axis, in numbers that its code supports.

    The model is on the meta device and is not changed. dense: its footprint. None if it has no such axis.
    """
    if axis not in graph.axes:
        return None
    groups = graph.on_axis(axis)
    sizes = {n: max(g.least, int(part * g.units) // g.multiple_of * g.multiple_of) for n, g in groups.items()}
    plan = Plan({n: Selection(g.units, (tuple(range(sizes[n])),) * g.groups) for n, g in groups.items()})
    smaller = copy.deepcopy(model)
    return footprint(smaller, apply_sizes(smaller, plan), dense.context).stored(dense.state_dtype)
