"""Score: every unit's importance on the dense model, in one pass over its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sspruner.axes import WHOLE_MODEL
from sspruner.calibrate.sources import Calibration, Progress, calibration
from sspruner.compute.device import check_whole, on_device
from sspruner.compute.processes import from_one, rank
from sspruner.files.journal import Journal
from sspruner.scoring.cache import cache_key, cached, store
from sspruner.scoring.job import OneScorer
from sspruner.scoring.run import Run
from sspruner.scoring.scores import Scores
from sspruner.scoring.walk import walk

Source = Calibration | str | Path | list[str] | torch.Tensor


def score(
    model: nn.Module,
    scorer: OneScorer | Sequence[OneScorer] = "ghost",
    *,
    calibration: Source = "self",
    samples: int = 32,
    seq_len: int = 256,
    tokenizer: Any = None,
    axis: str | Sequence[str] = "state",
    options: dict[str, Any] | None = None,
    device: str | None = None,
    seed: int = 0,
    cache: bool = False,
    progress: Progress | None = None,
) -> Any:
    """Score every unit of one axis or several on the dense model, in one pass over its layers. It is not changed.

    scorer: the name of an installed scorer, a Scorer subclass, or a name for each axis: returns its `Scores`. A list of
    such: returns a dict, name -> Scores; the forward passes are shared. options: the constructor's arguments;
    `name.option` is for that scorer alone. calibration: anything that `sspruner.calibration` takes, with samples and
    seq_len, or its result. Scorers that need weights only ignore it. cache: take scores that were made before, where
    model, scorer, its code, options, calibration and seed are the same (docs/calibration.md).
    Raises InputError for an unknown scorer, axis or option, PluginError if the scorer breaks its contract. Processes
    of one run (torch.distributed) share the work, and all get the same (docs/calibration.md).
    """
    several = isinstance(scorer, list | tuple)
    scorers: list[Any] = list(scorer) if isinstance(scorer, list | tuple) else [scorer]
    run = Run(model, scorers, [axis] if isinstance(axis, str) else list(axis), options, seed, device)
    across = "weights" in run.needs and any(name in WHOLE_MODEL for name in run.axes)
    if across or not run.needs <= {"weights", "activations"}:
        check_whole(model, "scores by gradients, by losses, or by weights of several blocks")
    data = None
    if run.needs_data:
        with on_device(model, run.device):
            data = calibrated(calibration, model, tokenizer, samples, seq_len, seed, progress)
    found = score_dense(run, data, cache, progress)
    return found if several else next(iter(found.values()))


def score_dense(
    run: Run, data: Calibration | None, cache: bool, progress: Progress | None, journal: Journal | None = None
) -> dict[str, Scores]:
    """All jobs' scores on the dense model: what the cache has is taken from there, the rest in one pass.

    Scorers that also change weights are run in any case, and so are those that read nothing but weights: quick enough.
    """
    keys = {}
    for job in run.jobs:
        if cache and data is not None and job.needs != {"weights"} and not job.changes_weights:
            code = [*(cls for cls, _ in job.scorers.values()), *(type(site.family) for site in run.graph.layers)]
            asked = {"axes": run.axes, "options": job.options, "seed": run.seed, "device": run.device.type}
            keys[job.label] = cache_key(run.model, code, asked, data.tokens, data.mask)
    found = from_one(lambda: {label: hit for label, key in keys.items() if key and (hit := cached(key))})
    order, run.jobs = run.jobs, [job for job in run.jobs if job.label not in found]
    made = walk(run, data, cut=None, progress=progress, journal=journal) if run.jobs else {}
    run.jobs = order
    for label, scores in made.items():
        if rank() == 0 and (key := keys.get(label)):
            store(key, scores)
    ordered = {label: replace(s, importance={n: s.importance[n] for n in run.groups}) for label, s in found.items()}
    return {job.label: (ordered | made)[job.label] for job in order if job.label not in run.refused}


def calibrated(
    source: Source,
    model: nn.Module,
    tokenizer: Any,
    samples: int,
    seq_len: int,
    seed: int,
    progress: Progress | None,
) -> Calibration:
    """The calibration itself, or one made from a source, the model being on the device that shall sample.

    Of several processes the first makes it for all.
    """

    def make() -> Calibration:
        if isinstance(source, Calibration):
            return source
        return calibration(source, model, tokenizer, samples=samples, seq_len=seq_len, seed=seed, progress=progress)

    return from_one(make)
