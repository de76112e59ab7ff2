"""Run: one or several scorers on one model, checked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sspruner.calibrate.gradients import check_differentiable
from sspruner.compute.device import resolve_device
from sspruner.compute.finite import check_finite
from sspruner.compute.processes import from_one
from sspruner.errors import InputError, PlanError, PluginError
from sspruner.graph.group import DependencyGroup
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.graph.trace import trace
from sspruner.plans.plan import basis_refused, check_updates
from sspruner.plans.reduction import Basis
from sspruner.scoring.job import Job, OneScorer
from sspruner.scoring.scorer import SELECT, Choose, Scorer, reduced
from sspruner.surgery.mask import is_masked


class Run:
    """One or several jobs on one model, in one pass over its layers: what `score` and `prune` share.

    tolerant: a job whose scorer refuses this model is left out, with the reason in `refused`.
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
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice:
            raise InputError(f"scorer {twice!r} is given twice")
        known = {option for job in self.jobs for option in job.options}
        unknown = [option for option in options or {} if option not in known]
        if unknown:
            raise InputError(
                f"option {unknown[0]!r}: no scorer of this run is called {unknown[0].rpartition('.')[0]!r}"
            )
        if is_masked(model):
            raise PlanError("the model is masked; call sspruner.unmask(model) first")
        self.model, self.axes, self.seed = model, axes, seed
        check_finite(model)
        self.graph: SSMGraph = trace(model)
        self.groups = {name: g for axis in axes for name, g in self.graph.on_axis(axis).items()}
        self.device = resolve_device(device)
        self.needs = {need for job in self.jobs for need in job.needs}
        self.needs_data = self.needs != {"weights"}
        if self.needs & {"gradients", "fisher"}:
            check_differentiable(model)
        for job in self.jobs:
            self._check_basis(job)
        self.tolerant, self.refused = tolerant, dict[str, str]()
        self.bases: dict[str, Basis] = {}  # dependency group -> the directions that its units are, of the last job
        # Dependency group -> who scored it, if it has more to say (reduce), and the process that knows it all.
        self.scorers: dict[str, tuple[Scorer, int]] = {}

    @property
    def granularity(self) -> dict[str, str]:
        """Where single elements compete, by axis, as the first job's scorers say."""
        return {axis: cls.granularity for axis, (cls, _) in self.jobs[0].scorers.items()}

    @property
    def has_basis(self) -> bool:
        """Whether a scorer has a basis of its own."""
        return any(cls.basis != SELECT for job in self.jobs for cls, _ in job.scorers.values())

    def _check_basis(self, job: Job) -> None:
        """Raise InputError where a scorer wants another basis of a state that can have none."""
        for name, group in self.groups.items():
            cls, _ = job.scorers[group.axis]
            if cls.basis != SELECT and (why := basis_refused(group, self.graph)):
                raise InputError(f"{name}: no basis {cls.basis!r} of this state: {why}; use --basis {SELECT}")

    def reduce(
        self, group: DependencyGroup, importance: torch.Tensor, choose: Choose
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What stays of a group that has been scored, and what the scorer makes of the rest. One job."""
        (job,) = self.jobs
        cls, plugin = job.scorers[group.axis]
        if cls.reduce is Scorer.reduce:  # it has no more to say; such scores may also be from the cache
            return choose(importance), {}
        scorer, knows = self.scorers.pop(group.name)  # its statistics go with it
        keep, updates = from_one(lambda: reduced(scorer, group, plugin, importance, choose), knows)
        try:
            check_updates(updates, self.model, self.graph)
        except PlanError as error:
            raise PluginError(f"plugin {plugin!r}: scorer {cls.name!r} on {group.name}: {error}") from error
        return keep, updates
