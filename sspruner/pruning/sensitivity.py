"""Sensitivity: measured damage of cutting each layer alone. The allocation "adaptive" splits a budget by it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from sspruner.axes import WHOLE_MODEL, axis_of
from sspruner.budgets.decide import select
from sspruner.calibrate.sources import Calibration, Progress
from sspruner.compute.device import on_device, resolve_device
from sspruner.compute.forward import check_predicts_tokens
from sspruner.compute.settings import undisturbed
from sspruner.errors import InputError
from sspruner.evaluation.damage import damages
from sspruner.files import strict_json
from sspruner.files.output import write_file
from sspruner.graph.group import DependencyGroup
from sspruner.graph.trace import trace
from sspruner.plans.plan import Plan
from sspruner.scoring.scores import Scores

LEVELS = (3 / 4, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 0.0)  # fractions of the units to keep; 0: one step
TOKENS = 4096  # number of tokens to measure on
MADE_WITH = ("model", "scorer", "options")  # keys of the scores' metadata that curves depend on


@dataclass(frozen=True)
class Sensitivity:
    """Damage curves by dependency group.

    curves      dependency group -> units kept -> KL to the dense model, nats per token, of cutting this group alone
    tokens      number of tokens measured on
    made_with   model, scorer and options of the scores that chose the units
    """

    curves: Mapping[str, Mapping[int, float]]
    tokens: int
    made_with: Mapping[str, str] = field(default_factory=dict)

    def check(self, scores: Scores) -> None:
        """Raise InputError unless the curves were measured with these scores' model, scorer and options."""
        for what, measured in self.made_with.items():
            if (actual := scores.metadata.get(what, "")) != measured:
                raise InputError(
                    f"sensitivity: measured with {what} {measured}, the scores are of {actual}; measure again"
                )

    def save(self, path: str | Path) -> None:
        """Write the curves as JSON, atomically."""
        data = {"version": 1, "tokens": self.tokens, "made_with": dict(self.made_with)}
        data |= {"curves": {name: dict(curve) for name, curve in self.curves.items()}}
        write_file(path, strict_json.dumps(data, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Read curves that `save` wrote. Raises InputError if the file is missing or malformed."""
        try:
            data = strict_json.loads(Path(path).read_text(encoding="utf-8"))
            curves = {str(n): {int(k): float(v) for k, v in curve.items()} for n, curve in data["curves"].items()}
            result = cls(curves, int(data["tokens"]), {str(k): str(v) for k, v in data["made_with"].items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            detail = f"{type(error).__name__}: {error}"
            raise InputError(f"sensitivity {path}: cannot be read ({detail}); measure it again") from error
        if not all(math.isfinite(v) for curve in curves.values() for v in curve.values()):
            raise InputError(f"sensitivity {path}: holds numbers that are not finite; measure it again")
        return result


@undisturbed
def sensitivity(
    model: nn.Module,
    scores: Scores,
    calibration: Calibration,
    *,
    multiple_of: int = 1,
    device: str | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Mask the worst units of one dependency group at a time, at a few levels, and measure KL to the dense model.

    Uses the first TOKENS of `calibration.tokens`: one forward pass over them for each group and level, plus one for the
    dense model. Groups of the whole model and of single elements are left out. The model is not changed.
    """
    with on_device(model, resolve_device(device)):
        return damage_curves(model, scores, calibration, multiple_of, progress)


@torch.no_grad()
def damage_curves(
    model: nn.Module, scores: Scores, calibration: Calibration, multiple_of: int, progress: Progress | None = None
) -> Sensitivity:
    """Measure `sensitivity` on the device that the model is on."""
    check_predicts_tokens(model, "sensitivity")
    graph = trace(model)
    plans: dict[tuple[str, int], Plan] = {}
    for name, importance in scores.importance.items():
        group = graph.groups.get(name)
        if group is not None and axis_of(name) not in WHOLE_MODEL:
            for kept in levels(group, multiple_of):
                plans[name, kept] = Plan({name: select(importance, kept, basis=scores.bases.get(name))})
    if not plans:
        raise InputError(
            "allocation adaptive: nothing to measure; it wants an axis with a group of units in each layer"
        )
    seq_len = calibration.tokens.shape[1]
    few = replace(calibration, tokens=calibration.tokens[: max(1, TOKENS // seq_len)])
    few = replace(few, mask=calibration.mask[: len(few.tokens)])
    batches = few.batches(logits=True)
    costs = damages(model, list(plans.values()), graph, batches, progress)
    curves: dict[str, dict[int, float]] = {}
    for (name, kept), cost in zip(plans, costs, strict=True):
        if not math.isfinite(cost.kl):
            raise InputError(f"{name}: cutting it to {kept} units gives logits that are not finite")
        curves.setdefault(name, {})[kept] = max(cost.kl, 0.0)
    made_with = {what: scores.metadata[what] for what in MADE_WITH if what in scores.metadata}
    return Sensitivity(curves, int(few.mask.sum()), made_with)


def levels(group: DependencyGroup, multiple_of: int) -> list[int]:
    """Return the sizes at which a group is measured, largest first: near LEVELS, in its steps, below its full size."""
    counts = group.counts(multiple_of)
    sizes = {max(round(group.units * level / counts.step) * counts.step, counts.start) for level in LEVELS}
    return sorted((size for size in sizes if size < group.units), reverse=True)
