"""Stages: the data that a prune hands on, from a recipe on a model to the outcome of the cut."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from sspruner.budgets.budget import ResolvedBudget
from sspruner.calibrate.sources import Calibration, Progress
from sspruner.evaluation.damage import Damage
from sspruner.evaluation.output_error import OutputError
from sspruner.files.journal import Journal
from sspruner.formats.targets import Fit
from sspruner.plans.plan import Plan
from sspruner.pruning.reconstruct_notes import Layer
from sspruner.recipes.recipe import Recipe
from sspruner.scoring.run import Run
from sspruner.scoring.score import Source
from sspruner.scoring.scores import Scores
from sspruner.surgery.proof import Proof


@dataclass(frozen=True)
class Machine:
    """Where and with what a recipe is run; nothing here changes the cut.

    calibration   a `Calibration`, or a source other than text, instead of the recipe's
    """

    calibration: Source | None = None
    tokenizer: Any = None
    device: str | None = None
    cache: bool = False
    resume: bool = False
    progress: Progress | None = None


@dataclass
class Clock:
    """Timer: seconds by phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = round(time.perf_counter() - start, 3)


@dataclass(frozen=True)
class PruneJob:
    """A recipe on a model, ready to run.

    budget     resolved; for limits of size that are known before scoring, with the fraction that meets them
    rounded    what was rounded to the sizes of the target, as lines of text
    one_shot   True: all layers are scored on the dense model before any is cut
    dense      sizes of the dense model, as in the report
    refit_text  calibration text of the refit, which may have more windows than are scored
    """

    recipe: Recipe
    machine: Machine
    run: Run
    budget: ResolvedBudget
    fit: Fit | None
    rounded: list[str]
    one_shot: bool
    dense: dict[str, Any]
    data: Calibration
    refit_text: Calibration
    clock: Clock
    cutter: Cutter

    @property
    def model(self) -> Any:
        """Return the model, which is pruned in place."""
        return self.run.model


@dataclass(frozen=True)
class Decision:
    """A plan and the measurements that led to it.

    budget     resolved budget, with the fraction that the search chose
    kept       dependency group -> units to keep: bool (groups, units)
    search     what was measured before the cut: limits, curves, scorers; as in the report
    one_size   plan with one size for all layers, to compare with, if layers keep different sizes
    selected   plan before the refit, if there was one
    errors     block -> its error before and after the refit
    layers     of a reconstruction: cut module -> how its training went
    """

    plan: Plan
    scores: Scores
    budget: ResolvedBudget
    kept: Mapping[str, torch.Tensor]
    search: dict[str, Any]
    one_size: Plan | None = None
    selected: Plan | None = None
    errors: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    layers: Mapping[str, Layer] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """Measurements of a cut.

    damage           of the plan that was cut, on what is held out; of a model that predicts no tokens its output error,
                     and None without anything held out
    without_refit    of the plan before its refit; equal to `damage` without one
    one_size         of the plan with one size for all layers, if there is one
    proof            None in mask mode
    continuation     the texts that the dense and the pruned model generate after a prompt; None without a tokenizer
    """

    damage: Damage | OutputError | None
    without_refit: Damage | OutputError | None
    one_size: Damage | OutputError | None
    proof: Proof | None
    continuation: dict[str, Any] | None


class Cutter(Protocol):
    """Interface: cut a model by a decision, measure and prove the cut."""

    compares_one_size: bool

    def journal(self, job: PruneJob) -> Journal | None:
        """Return the journal of a run that can be resumed, else None."""

    def cut(self, job: PruneJob, decision: Decision) -> Outcome:
        """Measure the damage on held-out text, cut in place, and prove the cut. Raises ProofError."""
