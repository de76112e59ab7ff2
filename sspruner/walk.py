"""The walk over a model's layers: each is shown to the scorers, scored, and cut before the next one is shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import sspruner
from sspruner.calibrate.gradients import mean_gradients, predicted_tokens
from sspruner.calibrate.replay import Replay, within
from sspruner.calibrate.sources import Calibration, Progress
from sspruner.calibrate.view import SSMView
from sspruner.errors import InputError, PlanError
from sspruner.graph.fingerprint import fingerprint
from sspruner.graph.group import DependencyGroup
from sspruner.graph.ssm_graph import WHOLE_MODEL, SSMGraph, trace
from sspruner.io.load import check_finite
from sspruner.planning.scores import Scores
from sspruner.plugins import manager
from sspruner.plugins.scorer import Scorer, check_scorer_class, checked_importance, make_scorer
from sspruner.plugins.scorer import observe as observe_layer
from sspruner.surgery.mask import is_masked

TOKENS_PER_BATCH = 4096  # tokens that go through one block at a time


class Run:
    """A scorer for each axis, on one model: what `score` and `prune` share."""

    def __init__(
        self,
        model: nn.Module,
        scorer: str | type[Scorer] | Mapping[str, str],
        axes: list[str],
        options: dict[str, Any] | None,
        seed: int,
        device: str | None,
    ) -> None:
        self.scorers = {axis: _scorer_for(axis, scorer) for axis in axes}
        unused = [axis for axis in scorer if axis not in axes] if isinstance(scorer, Mapping) else []
        if unused:
            raise InputError(f"a scorer for axis {unused[0]!r}, which is not cut; these are: {', '.join(axes)}")
        if is_masked(model):
            raise PlanError("the model is masked; call sspruner.unmask(model) first")
        self.model, self.axes, self.options, self.seed = model, axes, options or {}, seed
        check_finite(model)
        self.graph: SSMGraph = trace(model)
        self.groups = {name: g for axis in axes for name, g in self.graph.on_axis(axis).items()}
        self.device = resolve_device(device)
        for axis in axes:
            self.make(axis)  # wrong options fail here, before any work
        self.label = ", ".join(dict.fromkeys(cls.name for cls, _ in self.scorers.values()))
        self.needs = {cls.needs for cls, _ in self.scorers.values()}
        self.needs_data = self.needs != {"weights"}

    def make(self, axis: str) -> Scorer:
        return make_scorer(self.scorers[axis][0], axis=axis, seed=self.seed, options=self.options)

    def walk(
        self,
        data: Calibration | None,
        cut: Callable[[DependencyGroup, torch.Tensor], None] | None,
        progress: Progress | None,
    ) -> Scores:
        """Score every dependency group in layer order; `cut`, if given, is applied before the next layer's inputs.

        Groups of the whole model (hidden, block, mixer) are scored on the way and never cut on the way.
        """
        walk = _Walk(self, data)
        name_of_model = fingerprint(self.model)
        walk.score([g for g in self.groups.values() if self.scorers[g.axis][0].needs != "activations"])
        if walk.replay is not None:
            blocks = walk.replay.blocks
            for number, block in enumerate(blocks):
                if progress:
                    progress(f"scoring {block}", number, len(blocks))
                walk.observe(block)
                done = walk.complete(block)
                walk.score([group for group in done if group.name in walk.at_work])
                for group in done if cut else ():  # only now, so that no group is scored on another's cut
                    if group.axis not in WHOLE_MODEL:
                        cut(group, walk.importance[group.name])  # type: ignore[misc]
                if block != blocks[-1]:
                    walk.replay.advance(block)
            if progress:
                progress("scoring", len(blocks), len(blocks))
        importance = {name: walk.importance[name] for name in self.groups}
        return Scores(importance, self._metadata(name_of_model, data, sequential=cut is not None))

    def _metadata(self, model: str, data: Calibration | None, sequential: bool) -> dict[str, str]:
        used = data if self.needs_data else None
        return {
            "sspruner": sspruner.__version__,
            "scorer": self.label,
            "options": json.dumps(self.options, sort_keys=True),
            "model": model,
            "sequential": str(sequential).lower(),
            "calibration": used.source if used else "",
            "tokens": str(int(used.mask.sum())) if used else "0",
            "seed": str(self.seed),
        }


class _Walk:
    """One pass over a model: the scorers at work, and what they have returned."""

    def __init__(self, run: Run, data: Calibration | None) -> None:
        self.run, self.graph = run, run.graph
        self.importance: dict[str, torch.Tensor] = {}
        self.at_work = {name: run.make(group.axis) for name, group in run.groups.items()}
        self.gradients: dict[str, torch.Tensor] | None = None
        self.replay: Replay | None = None
        if data is not None:
            per_batch = max(1, TOKENS_PER_BATCH // data.tokens.shape[1])
            if "gradients" in run.needs:
                with on_device(run.model, run.device):
                    self.gradients = mean_gradients(run.model, data.batches(per_batch), predicted_tokens(data.mask))
            if "activations" in run.needs:
                self.replay = Replay(run.model, run.graph, data.batches(per_batch), run.device)
        self.sites = {path: site for site in run.graph.sites for path in (site.path, *site.aliases)}

    def _active(self) -> list[DependencyGroup]:
        return [g for name, g in self.run.groups.items() if name in self.at_work]

    def observe(self, block: str) -> None:
        """Show one block's modules, and the block itself, to the scorers that need activations."""
        assert self.replay is not None
        watching: dict[str, list[DependencyGroup]] = {}
        for group in self._active():
            for path in self._paths(group):
                if within(path, block):
                    watching.setdefault(path, []).append(group)
        whole = [group for group in watching.get(block, []) if group.axis == "block"]
        watching = {p: [g for g in groups if g.axis != "block"] for p, groups in watching.items()}
        watching = {path: groups for path, groups in watching.items() if groups}

        def show(path: str, hidden: torch.Tensor, mask: torch.Tensor) -> None:
            family = self.sites[path].family
            for group in watching[path]:
                self._observe(group, SSMView(self.run.model, path, group, mask, family=family, hidden=hidden))

        if watching:
            self.replay.observe(block, list(watching), show)
        for hidden, output, counted in self.replay.outputs(block) if whole else ():
            for group in whole:
                self._observe(group, SSMView(self.run.model, block, group, counted, hidden=hidden, output=output))

    def _paths(self, group: DependencyGroup) -> list[str]:
        """The modules that are observed for one group: a shared one wherever it is called."""
        if group.blocks:
            return [block.path for block in group.blocks]
        if group.layer in self.sites:
            return [group.layer, *self.sites[group.layer].aliases]
        return [path for path, site in self.sites.items() if site.family]  # hidden: every mixer

    def complete(self, block: str) -> list[DependencyGroup]:
        """The groups of which this block holds the last module."""
        assert self.replay is not None
        later = self.replay.blocks[self.replay.blocks.index(block) + 1 :]
        return [
            group
            for group in self.run.groups.values()
            if any(within(path, block) for path in self._paths(group))
            and not any(within(path, b) for path in self._paths(group) for b in later)
        ]

    def score(self, groups: list[DependencyGroup]) -> None:
        """Take the importances of groups that have been observed, or that need no more than weights and gradients."""
        nothing = torch.ones(0, 0, dtype=torch.bool)
        for group in groups:
            scorer, plugin = self.at_work.pop(group.name), self.run.scorers[group.axis][1]
            if scorer.needs != "activations":
                view = SSMView(self.run.model, group.layer, group, nothing, gradients=self.gradients)
                observe_layer(scorer, view, plugin)
            self.importance[group.name] = checked_importance(scorer, group, plugin)

    def _observe(self, group: DependencyGroup, view: SSMView) -> None:
        observe_layer(self.at_work[group.name], view, self.run.scorers[group.axis][1])


def _scorer_for(axis: str, scorer: str | type[Scorer] | Mapping[str, str]) -> tuple[type[Scorer], str]:
    """The scorer class for one axis and its plugin. Raises InputError if there is none, or if it cannot score it."""
    if isinstance(scorer, Mapping):
        if axis not in scorer:
            raise InputError(f"no scorer for axis {axis!r}: {', '.join(scorer)} have one; add {axis}=NAME")
        scorer = scorer[axis]
    if isinstance(scorer, str):
        cls, plugin = manager.scorer(scorer)
    else:
        cls, plugin = scorer, getattr(scorer, "__module__", "?")
        check_scorer_class(cls, plugin)
    if axis not in cls.axes:
        able = [name for name, (other, _) in sorted(manager.scorers().items()) if axis in other.axes]
        hint = f"; these score {axis}: {', '.join(able)}" if able else ""
        raise InputError(
            f"scorer {cls.name!r} does not score axis {axis!r}; it scores {', '.join(sorted(cls.axes))}{hint}"
        )
    return cls, plugin


def resolve_device(device: str | None) -> torch.device:
    """The compute device: the one named, else CUDA if there is one, else the CPU. Raises InputError for no device."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r}: not available here ({str(error).splitlines()[0]})") from error
    return found


@contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The whole model on `device` inside the block, and back where it was after it."""
    home = next(model.parameters()).device
    model.to(device)
    try:
        yield
    finally:
        model.to(home)
