"""Layer-by-layer pass over a model: show each layer to the scorers, score it, and cut it before the next layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from sspruner.axes import ELEMENT_AXES, WHOLE_MODEL
from sspruner.calibrate.gradients import mean_and_fisher, mean_gradients, predicted_tokens
from sspruner.calibrate.local import LocalGradients
from sspruner.calibrate.replay import Inputs, Replay
from sspruner.calibrate.seen import KEY
from sspruner.calibrate.shards import part_of_this_process, summed
from sspruner.calibrate.sources import Calibration, Progress
from sspruner.calibrate.view import Observation, SSMView
from sspruner.compute.device import offloaded, on_device, resident
from sspruner.compute.processes import from_one, gathered, world
from sspruner.compute.quick import quick_on_cpu
from sspruner.compute.quick_scan import quick_streams
from sspruner.errors import InputError, ModelError
from sspruner.evaluation.damage import mean_loss
from sspruner.files import strict_json
from sspruner.files.journal import Journal
from sspruner.files.provenance import versions
from sspruner.graph.fingerprint import fingerprint
from sspruner.graph.group import DependencyGroup
from sspruner.graph.site import within
from sspruner.plans.reduction import PARTS, Basis, Selection
from sspruner.scoring.job import Job
from sspruner.scoring.run import Run
from sspruner.scoring.scorer import SELECT, Scorer, checked_coordinates, checked_importance, combine
from sspruner.scoring.scorer import observe as observe_layer
from sspruner.scoring.scores import Scores
from sspruner.surgery.mask import mask_group, unmask

PHASE = "walk"  # name of the journal's phase

CutBlock = Callable[[dict[str, torch.Tensor]], None]  # called with dependency group -> importance, newly scored


def walk(
    run: Run, data: Calibration | None, cut: CutBlock | None, progress: Progress | None, journal: Journal | None = None
) -> dict[str, Scores]:
    """Score every dependency group in layer order: a job's label -> its Scores.

    cut      called before the next layer's inputs are computed; then there must be one job. Groups of the whole model
             (hidden, block, mixer) are scored but not cut during the walk
    journal  records finished blocks, after which the walk resumes; then there must be one job
    """
    model = fingerprint(run.model)
    if len({*gathered(model)}) > 1:
        raise InputError("the processes of this run hold different models; give all of them the same")
    with quick_on_cpu(run.model, run.device), quick_streams(run.model, run.device):
        under_way = _Walk(run, data, sequential=cut is not None)
        under_way.score(under_way.at_once())
        if under_way.replay is not None:
            blocks = under_way.replay.blocks
            first = under_way.resume(journal) if journal else 0
            for number, block in enumerate(blocks[first:], start=first):
                if progress:
                    progress(f"scoring {block}", number, len(blocks))
                with resident(run.model, block):
                    under_way.observe(block)
                    done = under_way.complete(block)
                    under_way.score(
                        [(job, group) for job, group in under_way.at_work if group in {g.name for g in done}]
                    )
                    if cut:  # after scoring, so that no group's scores depend on another's cut
                        importance = under_way.importance[run.jobs[0].label]
                        cut({g.name: importance[g.name] for g in done if g.axis not in WHOLE_MODEL})
                    if block != blocks[-1]:
                        under_way.replay.advance(block)
                    if offloaded(run.model):
                        unmask(run.model)  # before the block leaves memory
                if journal:
                    under_way.note(journal, number + 1)
            if progress:
                progress("scoring", len(blocks), len(blocks))
    return {
        job.label: Scores(
            {name: under_way.importance[job.label][name] for name in run.groups},
            dict(sorted(_metadata(run, job, model, data, sequential=cut is not None).items())),  # as from a file
            bases=under_way.bases[job.label],
        )
        for job in run.jobs
        if job.label not in run.refused
    }


def _metadata(run: Run, job: Job, model: str, data: Calibration | None, sequential: bool) -> dict[str, str]:
    observed = data if job.needs != {"weights"} else None
    spectra = [cls.spectrum for cls, _ in job.scorers.values() if cls.spectrum]
    zeros = {axis: cls.zero for axis, (cls, _) in job.scorers.items() if cls.zero}
    elements = {axis: cls.granularity for axis, (cls, _) in job.scorers.items() if axis in ELEMENT_AXES}
    return {
        "sspruner": versions()["sspruner"],
        "scorer": job.label,
        "options": strict_json.dumps(job.options, sort_keys=True),
        "model": model,
        "sequential": str(sequential).lower(),
        "calibration": observed.source if observed else "",
        "tokens": str(int(observed.mask.sum())) if observed else "0",
        **({KEY: observed.seen.to_json()} if observed else {}),
        "seed": str(run.seed),
        "comparable": strict_json.dumps(
            {axis: cls.comparable for axis, (cls, _) in job.scorers.items()}, sort_keys=True
        ),
        **({"granularity": strict_json.dumps(elements)} if elements else {}),
        **({"spectrum": spectra[0]} if spectra else {}),
        **({"zero": strict_json.dumps(zeros, sort_keys=True)} if zeros else {}),
        **({"changes_weights": ", ".join(dict.fromkeys(job.changes_weights))} if job.changes_weights else {}),
    }


class _Walk:
    """State of one pass over a model: the active scorers, and the scores so far.

    Several processes walk side by side, each with its part of the calibration. Statistics are combined before a group
    is scored, and one process computes the result for all, so that all of them cut the same.
    """

    def __init__(self, run: Run, data: Calibration | None, sequential: bool) -> None:
        self.run, self.graph, self.sequential = run, run.graph, sequential
        self.data = part_of_this_process(data) if data is not None and run.needs_data else None
        self.jobs = {job.label: job for job in run.jobs}
        self.importance: dict[str, dict[str, torch.Tensor]] = {label: {} for label in self.jobs}
        self.bases: dict[str, dict[str, Basis]] = {label: {} for label in self.jobs}
        self.at_work = {
            (label, name): job.make(group.axis)
            for name, group in run.groups.items()
            for label, job in self.jobs.items()
        }
        self.shown: set[str] = set()  # dependency groups whose activations were observed in this process
        self.knows: dict[str, int] = {}  # dependency group -> the first process that observed its activations
        self.gradients: Mapping[str, torch.Tensor] | None = None  # of the whole dense model
        self.fisher: Mapping[str, torch.Tensor] | None = None
        self.local: LocalGradients | None = None  # of single blocks, on the outputs of the cut blocks before them
        self.replay: Replay | None = None
        backward = {n for n, s in self.at_work.items() if s.needs in ("gradients", "fisher")}
        self.in_turn = {n for n in backward if sequential and run.groups[n[1]].axis not in WHOLE_MODEL}
        if not self.graph.blocks:
            self.in_turn = set()  # there is no list of blocks to walk over
        if self.data is not None:
            if backward - self.in_turn:
                self._whole_gradients({self.at_work[n].needs for n in backward - self.in_turn})
            if self.in_turn or any(scorer.needs == "activations" for scorer in self.at_work.values()):
                self.replay = Replay(run.model, run.graph, self._batches(), run.device)
            if self.in_turn:
                assert self.replay is not None
                fisher = any(self.at_work[n].needs == "fisher" for n in self.in_turn)
                self.local = LocalGradients(self.replay, fisher=fisher)
        self.sites = {path: site for site in run.graph.sites for path in (site.path, *site.aliases)}
        self.linear = _linear_paths(run.model, run.groups.values())

    def _batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Return this process's part of the calibration: (tokens, mask), (b, T) each."""
        assert self.data is not None
        return self.data.batches()

    def _whole_gradients(self, needs: set[str]) -> None:
        """Compute the gradients of the whole dense model."""
        assert self.data is not None
        with on_device(self.run.model, self.run.device):
            count = sum(gathered(predicted_tokens(self.data.mask)))
            if "fisher" in needs:
                self.gradients, self.fisher = mean_and_fisher(self.run.model, self._batches(), count)
            else:
                self.gradients = mean_gradients(self.run.model, self._batches(), count)

    def note(self, journal: Journal, done: int) -> None:
        """Write the progress of the walk to a journal: the inputs of the next block, and the scores so far."""
        assert self.replay is not None
        (label,) = self.jobs
        flows = {f"{i} {part}": h for i, flow in enumerate(self.replay.hidden) for part, h in enumerate(flow)}
        scores = {f"importance {name}": value for name, value in self.importance[label].items()}
        parts = {f"{p} {n}": t for n, basis in self.bases[label].items() for p, t in zip(PARTS, basis, strict=True)}
        journal.write(PHASE, done, flows | scores | parts)

    def resume(self, journal: Journal) -> int:
        """Resume from a journal. Returns the number of finished blocks."""
        assert self.replay is not None
        (label,) = self.jobs
        done, tensors = journal.read(PHASE)
        if done:
            hidden = enumerate(self.replay.hidden)
            self.replay.hidden = [tuple(tensors[f"{i} {part}"] for part in range(len(flow))) for i, flow in hidden]
        for name in [key.removeprefix("importance ") for key in tensors if key.startswith("importance ")]:
            self.at_work.pop((label, name), None)
            self.importance[label][name] = tensors[f"importance {name}"]
            if f"{PARTS[0]} {name}" in tensors:
                encode, decode = (tensors[f"{part} {name}"] for part in PARTS)
                self.run.bases[name] = self.bases[label][name] = encode, decode
        return done

    def at_once(self) -> list[tuple[str, str]]:
        """Return the scorers that need no walk: of weights, whole gradients, or losses."""
        return [n for n, scorer in self.at_work.items() if scorer.needs != "activations" and n not in self.in_turn]

    def observe(self, block: str) -> None:
        """Show one block's modules, and the block itself, to the scorers that need activations."""
        assert self.replay is not None
        watching: dict[str, list[DependencyGroup]] = {}
        active = {name for (_, name), scorer in self.at_work.items() if scorer.needs == "activations"}
        for group in self.run.groups.values():
            for path in self._paths(group) if group.name in active else ():
                if within(path, block):
                    watching.setdefault(path, []).append(group)
        whole = [group for group in watching.get(block, []) if group.axis == "block"]
        watching = {p: [g for g in groups if g.axis != "block"] for p, groups in watching.items()}
        watching = {path: groups for path, groups in watching.items() if groups}

        def show(path: str, hidden: torch.Tensor, mask: torch.Tensor, inputs: Inputs) -> None:
            site = self.sites.get(path)
            first = site.path if site else watching[path][0].layer
            family = site.family if site else None
            seen = Observation(self.run.model, path, mask, site=first, family=family, hidden=hidden, inputs=inputs)
            for group in watching[path]:
                self._show(group, seen)

        if watching:
            # Unless it will be cut, or its input is needed below, a block that ran for an observer has run.
            self.replay.observe(block, list(watching), show, advance=not (self.sequential or whole))
        for hidden, output, counted in self.replay.outputs(block) if whole else ():
            for group in whole:
                self._show(group, Observation(self.run.model, block, counted, hidden=hidden, output=output))
        if self.local is not None and any(self._touches(self.run.groups[name], block) for _, name in self.in_turn):
            self.local.add(block)

    def _paths(self, group: DependencyGroup) -> list[str]:
        """Return the paths of the modules that are observed for one group; a shared module has one for each call."""
        if group.blocks:
            return [block.path for block in group.blocks]
        if group.axis == "weight":
            return self.linear[group.name]
        if group.layer in self.sites:
            return [group.layer, *self.sites[group.layer].aliases]
        inside = [
            path for path in self.sites if within(path, self.graph.blocks)
        ]  # hidden: all modules that read or write it
        return [p for p in inside if any(isinstance(m, nn.Linear) for m in self.run.model.get_submodule(p).modules())]

    def _touches(self, group: DependencyGroup, block: str) -> bool:
        return any(within(path, block) for path in self._paths(group))

    def complete(self, block: str) -> list[DependencyGroup]:
        """Return the groups whose last module is in this block."""
        assert self.replay is not None
        later = self.replay.blocks[self.replay.blocks.index(block) + 1 :]
        return [
            group
            for group in self.run.groups.values()
            if self._touches(group, block) and not any(self._touches(group, b) for b in later)
        ]

    def score(self, names: list[tuple[str, str]]) -> None:
        """Collect the importances of groups that have been observed, or that need only weights and gradients."""
        self._agree()
        for label, name in names:
            with self._tolerating(label):
                self._score(label, name)

    @contextmanager
    def _tolerating(self, label: str) -> Iterator[None]:
        """Context manager that drops a job whose scorer refuses this model, if there are others."""
        try:
            yield
        except InputError as error:
            if not self.run.tolerant:
                raise
            self._refuse({label: str(error)})

    def _refuse(self, refused: Mapping[str, str]) -> None:
        """Drop jobs, label -> reason. Raises InputError if none is left."""
        self.run.refused.update(refused)
        self.at_work = {key: scorer for key, scorer in self.at_work.items() if key[0] not in self.run.refused}
        if len(self.run.refused) == len(self.jobs):
            raise InputError(next(reversed(self.run.refused.values())))

    def _agree(self) -> None:
        """Share between processes which groups were observed and which jobs were refused."""
        for number, (shown, refused) in enumerate(gathered((self.shown, self.run.refused))):
            for name in shown:
                self.knows.setdefault(name, number)
            self._refuse({label: why for label, why in refused.items() if label not in self.run.refused})

    def _score(self, label: str, name: str) -> None:
        if label in self.run.refused:
            return
        scorer, group = self.at_work.pop((label, name)), self.run.groups[name]
        plugin = self.jobs[label].scorers[group.axis][1]
        if scorer.needs == "activations" and name not in self.knows:
            raise ModelError(
                f"{name}: its module never ran on the calibration text (a fused kernel, or an expert that got no "
                "token?); it cannot be scored by activations"
            )
        if scorer.needs != "activations":
            with resident(self.run.model, group.layer):
                observe_layer(scorer, self._still(scorer, group, (label, name) in self.in_turn), plugin)
        elif world() > 1:
            combine(scorer, group, plugin, summed)
        source = self.knows.get(name, 0)
        self.importance[label][name] = from_one(lambda: checked_importance(scorer, group, plugin), source)
        if scorer.basis != SELECT:
            basis = from_one(lambda: checked_coordinates(scorer, group, plugin), source)
            self.run.bases[name] = self.bases[label][name] = basis
        if type(scorer).reduce is not Scorer.reduce:
            self.run.scorers[name] = scorer, source

    def _still(self, scorer: Scorer, group: DependencyGroup, in_turn: bool) -> SSMView:
        """Return a view without activations: weights, and the gradients or losses that the scorer needs."""
        seen = Observation(self.run.model, group.layer, torch.ones(0, 0, dtype=torch.bool))
        local = self.local if in_turn else None
        fisher = (local.fisher if local else self.fisher) if scorer.needs == "fisher" else None
        gradients = local.gradients if local else self.gradients
        return SSMView(
            seen,
            group,
            gradients=gradients if scorer.needs in ("gradients", "fisher") else None,
            fisher=fisher,
            loss=(lambda units: self._loss(group, units)) if scorer.needs == "loss" else None,
        )

    def _loss(self, group: DependencyGroup, units: Sequence[int]) -> float:
        """Return the mean calibration loss with some units of a group of whole modules masked. Before any cut."""
        if not group.blocks:
            raise InputError("losses without a unit are measured on the axes block and mixer only")
        keep = tuple(unit for unit in range(group.units) if unit not in set(units))
        with on_device(self.run.model, self.run.device):
            mask_group(self.run.model, group, Selection(group.units, (keep,)))
            try:
                return mean_loss(self.run.model, self._batches())
            finally:
                unmask(self.run.model)

    def _show(self, group: DependencyGroup, seen: Observation) -> None:
        for label, job in self.jobs.items():
            scorer = self.at_work.get((label, group.name))
            if scorer is not None and scorer.needs == "activations":
                self.shown.add(group.name)
                with self._tolerating(label):
                    observe_layer(scorer, SSMView(seen, group), job.scorers[group.axis][1])


def _linear_paths(model: nn.Module, groups: Iterable[DependencyGroup]) -> dict[str, list[str]]:
    """Return, for each group of the axis `weight`, the linear layers that have its tensor."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            paths.setdefault(id(module.weight), []).append(path)
    return {g.name: paths[id(model.get_parameter(g.tensor))] for g in groups if g.axis == "weight"}
