"""Notes of a reconstruction: the outcome for each module, and a journal from which an interrupted run goes on.

The journal has a file for each block, with its new values and outcomes, and one with the stream behind the last of
them. New values are read back from there, so that those of all blocks need not be in memory at once.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

import torch

from sspruner.calibrate.replay import Replay
from sspruner.files.journal import Journal
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import PARTS, Projection, projections, tensors_of
from sspruner.pruning.fit import mean_error

PHASE = "refit"  # name of this phase in the journal
LAYERS = "layers"  # outcomes, as JSON in bytes, in the file of a block
Layers = dict[str, "Layer"]


@dataclass(frozen=True)
class Layer:
    """Outcome for one module, as in report.json.

    held_out   kind of held-out text -> squared error over the energy of the dense output, before and after
    step       the step that was kept, 0 for none
    steps      steps that were made
    stopped    why training ended before its last step, "" if it did not
    """

    held_out: dict[str, tuple[float, float]]
    step: int
    steps: int
    stopped: str
    seconds: float

    @property
    def error(self) -> tuple[float, float]:
        """Geometric mean of the errors over the kinds of held-out text, before and after: what chose the step."""
        before, after = (mean_error({kind: pair[i] for kind, pair in self.held_out.items()}) for i in range(2))
        return before, after


def note(journal: Journal | None, number: int, before: Plan, plan: Plan, layers: Layers, cut: Replay) -> Plan:
    """Write down one block. before: the plan without its new values. Returns `plan` with these values in the file."""
    if journal is None:
        return plan
    new = {name: value for name, value in plan.updates.items() if before.updates.get(name) is not value}
    old = projections(before.groups)
    changed = {name: p for name, p in projections(plan.groups).items() if p is not old[name]}
    text = json.dumps({path: asdict(layer) for path, layer in layers.items()}).encode()
    values = new | tensors_of(changed) | {LAYERS: torch.frombuffer(bytearray(text), dtype=torch.uint8)}
    journal.write(f"{PHASE}.{number}", 1, values)
    stream = {f"{b}.{i}": h for b, flow in enumerate(cut.hidden) for i, h in enumerate(flow)}
    journal.write(PHASE, number + 1, stream)
    return _with_values(plan, journal.mapped(f"{PHASE}.{number}"))


def resumed(journal: Journal | None, plan: Plan, cut: Replay) -> tuple[int, Plan, Layers]:
    """Return how many blocks a journal holds, the plan with their new values, and the outcomes.

    Moves `cut` behind them.
    """
    done, stream = (0, {}) if journal is None else journal.read(PHASE)
    if journal is None or not done:
        return 0, plan, {}
    cut.hidden = [tuple(stream[f"{b}.{i}"] for i in range(len(flow))) for b, flow in enumerate(cut.hidden)]
    layers: Layers = {}
    for number in range(done):
        values = journal.mapped(f"{PHASE}.{number}")
        found = json.loads(bytes(values[LAYERS].tolist()))
        layers = {path: Layer(**{**layer, "held_out": _pairs(layer["held_out"])}) for path, layer in found.items()}
        plan = _with_values(plan, values)
    return done, plan, layers


def _with_values(plan: Plan, values: dict[str, torch.Tensor]) -> Plan:
    """Return a plan with new values, and new matrices of projections, from the file of a block."""
    trained = {name: [f"{name}.{part}" for part in PARTS] for name in projections(plan.groups)}
    groups = {n: Projection(values[e], values[d]) for n, (e, d) in trained.items() if e in values}
    others = {LAYERS, *(name for names in trained.values() for name in names)}
    updates = {name: value for name, value in values.items() if name not in others}
    return replace(plan, groups={**plan.groups, **groups}, updates={**plan.updates, **updates})


def _pairs(held_out: dict[str, list[float]]) -> dict[str, tuple[float, float]]:
    return {kind: (before, after) for kind, (before, after) in held_out.items()}
