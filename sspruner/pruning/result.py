"""Result: what `prune` returns."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from sspruner.plans.plan import Plan
from sspruner.pruning.report import Report
from sspruner.scoring.scores import Scores


@dataclass(frozen=True)
class Result:
    """What `prune` returns: the model (the one given, cut in place), how it was cut, and what that cost."""

    model: nn.Module
    plan: Plan
    scores: Scores
    report: Report

    def named(self, model: str, command: str) -> Result:
        """The same result; its report says how the model was called and the command that ran."""
        return replace(self, report=replace(self.report, model=model, command=command))
