"""Run: one or several scorers on one model, checked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sspruner.calibrate.gradients import check_differentiable
from sspruner.compute.device import offloaded, resolve_device
from sspruner.compute.finite import check_finite
from sspruner.compute.forward import no_tokens, predicts_tokens
from sspruner.compute.inputs import example_values, reads_tokens
from sspruner.compute.processes import from_one
from sspruner.errors import InputError, PlanError, PluginError
from sspruner.graph.group import DependencyGroup
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.graph.trace import trace
from sspruner.graph.usable import check_present, check_vocabulary
from sspruner.plans.plan import basis_refused, check_updates
from sspruner.plans.reduction import Basis
from sspruner.scoring.job import Job, OneScorer
from sspruner.scoring.scorer import SELECT, Choose, Scorer, reduced
from sspruner.surgery.mask import is_masked


class Run:
    """One or several jobs on one model, in one pass over its layers; shared by `score` and `prune`.

    tolerant: leave out a job whose scorer refuses this model, with the reason in `refused`.
    """

    def __init__(
        self,
        model: nn.Module,
        scorers: Sequence[OneScorer],
        axes: list[str],
        options: dict[str, Any] | None,
        seed: int,
        device: str | None,
        *,
        tolerant: bool = False,
    ) -> None:
        self.jobs = [Job(scorer, axes, options or {}, seed) for scorer in scorers]
        labels = [job.label for job in self.jobs]
        duplicate = next((label for label in labels if labels.count(label) > 1), None)
        if duplicate:
            raise InputError(f"scorer {duplicate!r} is given twice")
        known = {option for job in self.jobs for option in job.options}
        unknown = [option for option in options or {} if option not in known]
        if unknown:
            raise InputError(
                f"option {unknown[0]!r}: no scorer of this run is called {unknown[0].rpartition('.')[0]!r}"
            )
        if is_masked(model):
            raise PlanError("the model is masked; call sspruner.unmask(model) first")
        self.model, self.axes, self.seed = model, axes, seed
        self.graph: SSMGraph = trace(model)
        check_vocabulary(model)
        if offloaded(model) is None:
            check_present(model)
        check_finite(model)
        self.groups = {name: g for axis in axes for name, g in self.graph.on_axis(axis).items()}
        self.device = resolve_device(device)
        self.needs = {need for job in self.jobs for need in job.needs}
        self.needs_data = self.needs != {"weights"}
        if (more := self.needs & {"gradients", "fisher", "loss"}) and not predicts_tokens(model):
            label = next(job.label for job in self.jobs if job.needs & more)
            raise InputError(
                f"scorer {label!r} needs the loss of a language model, and {no_tokens(model)}; use a scorer that needs "
                "weights or activations (`sspruner scorers`)"
            )
        if not reads_tokens(model):
            example_values(model)  # raises for a model on which no cut could be proved
        if self.needs & {"gradients", "fisher"}:
            check_differentiable(model)
        for job in self.jobs:
            self._check_basis(job)
        self.tolerant, self.refused = tolerant, dict[str, str]()
        self.bases: dict[str, Basis] = {}  # dependency group -> the basis of its units, of the last job
        # Dependency group -> its scorer, if that has a reduce of its own, and the rank of the process with its data.
        self.scorers: dict[str, tuple[Scorer, int]] = {}

    @property
    def granularity(self) -> dict[str, str]:
        """Scope within which single elements compete, by axis, as the first job's scorers define it."""
        return {axis: cls.granularity for axis, (cls, _) in self.jobs[0].scorers.items()}

    @property
    def has_basis(self) -> bool:
        """True if a scorer has a basis other than "select"."""
        return any(cls.basis != SELECT for job in self.jobs for cls, _ in job.scorers.values())

    def _check_basis(self, job: Job) -> None:
        """Raise InputError for a scorer with another basis on a state that cannot be projected."""
        for name, group in self.groups.items():
            cls, _ = job.scorers[group.axis]
            if cls.basis != SELECT and (why := basis_refused(group, self.graph)):
                raise InputError(f"{name}: no basis {cls.basis!r} of this state: {why}; use --basis {SELECT}")

    def reduce(
        self, group: DependencyGroup, importance: torch.Tensor, choose: Choose
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the units to keep of a scored group, and the scorer's new values of weights. For runs with one job."""
        (job,) = self.jobs
        cls, plugin = job.scorers[group.axis]
        if cls.reduce is Scorer.reduce:  # a plain selection; the scores may come from the cache
            return choose(importance), {}
        scorer, source = self.scorers.pop(group.name)  # frees its statistics
        keep, updates = from_one(lambda: reduced(scorer, group, plugin, importance, choose), source)
        try:
            check_updates(updates, self.model, self.graph)
        except PlanError as error:
            raise PluginError(f"plugin {plugin!r}: scorer {cls.name!r} on {group.name}: {error}") from error
        return keep, updates
