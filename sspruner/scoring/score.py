"""Score: every unit's importance on the dense model, in one pass over its layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from sspruner.axes import WHOLE_MODEL
from sspruner.calibrate.sources import HELD_OUT, Calibration, Progress, calibration
from sspruner.compute.device import check_whole, offloaded, on_device
from sspruner.compute.finite import refuse_not_finite
from sspruner.compute.forward import forward
from sspruner.compute.processes import from_one, rank
from sspruner.compute.progress import shown
from sspruner.compute.settings import undisturbed
from sspruner.errors import InputError, PluginError
from sspruner.files.journal import Journal
from sspruner.recipes.parts import CalibrationText, Scoring
from sspruner.recipes.yaml import nearest
from sspruner.scoring.cache import cache_key, cached, store
from sspruner.scoring.job import OneScorer
from sspruner.scoring.run import Run
from sspruner.scoring.scores import Scores
from sspruner.scoring.walk import walk

Source = Any  # a `Calibration`, or what `sspruner.calibration` takes


@undisturbed
def score(
    model: nn.Module,
    scorer: OneScorer | Sequence[OneScorer] = "ghost",
    *,
    axis: str | Sequence[str] = "state",
    calibration: Source = "self",
    tokenizer: Any = None,
    device: str | None = None,
    cache: bool = False,
    progress: Progress | bool | None = None,
    **short: Any,
) -> Any:
    """Score every unit of one axis or several on the dense model, in one pass over its layers. It is not changed.

    Args:
        scorer: the name of an installed scorer, a Scorer subclass, or a name for each axis: returns its `Scores`. A
            list of such: returns a dict, name -> Scores; the forward passes are shared.
        calibration: anything that `sspruner.calibration` takes, or its result. Scorers of weights alone ignore it.
        cache: take scores that were made before, where model, scorer, its code, options, calibration and seed are the
            same (docs/calibration.md).
        progress: called with (phase, done, total); True shows bars on standard error.
        short: samples, seq_len and text_column of the calibration, which holds nothing out; seed, and options, the
            arguments of the scorer's constructor;
            `name.option` is for that scorer alone.

    Raises InputError for an unknown scorer, axis or option, PluginError if the scorer breaks its contract. The
    processes of one run (torch.distributed) share the work, and all get the same (docs/calibration.md).
    """
    text, scoring = _score_parts(short)
    several = isinstance(scorer, list | tuple)
    scorers: list[Any] = list(scorer) if isinstance(scorer, list | tuple) else [scorer]
    axes = [axis] if isinstance(axis, str) else list(axis)
    run = Run(model, scorers, axes, dict(scoring.options), scoring.seed, device)
    across = "weights" in run.needs and any(name in WHOLE_MODEL for name in run.axes)
    if across or not run.needs <= {"weights", "activations"}:
        check_whole(model, "scores by gradients, by losses, or by weights of several blocks")
    data = None
    with shown(progress) as callback:
        if run.needs_data:
            with on_device(model, run.device):
                data = calibrated(calibration, model, tokenizer, text, scoring.seed, callback, held_out=0)
        with blamed_rightly(model, data, run.device):
            found = score_dense(run, data, cache, callback)
    return found if several else next(iter(found.values()))


def _score_parts(short: dict[str, Any]) -> tuple[CalibrationText, Scoring]:
    """Sort short arguments into the parts of a recipe that they belong to. Raises InputError for an unknown one."""
    known = ("samples", "seq_len", "text_column", "options", "seed")
    if unknown := next((name for name in short if name not in known), None):
        raise InputError(f"unknown argument {unknown!r}{nearest(unknown, known)}")
    text = {name: short[name] for name in known[:3] if name in short}
    return CalibrationText(**text), Scoring(**{name: short[name] for name in known[3:] if name in short})


def score_dense(
    run: Run, data: Calibration | None, cache: bool, progress: Progress | None, journal: Journal | None = None
) -> dict[str, Scores]:
    """Return all jobs' scores on the dense model, from the cache or from one pass.

    Scorers that also change weights are never cached, nor are those that only read weights, which are fast.
    """
    keys = {}
    for job in run.jobs:
        if cache and data is not None and job.needs != {"weights"} and not job.changes_weights:
            code = [*(cls for cls, _ in job.scorers.values()), *(type(site.family) for site in run.graph.layers)]
            request = {"axes": run.axes, "options": job.options, "seed": run.seed, "device": run.device.type}
            keys[job.label] = cache_key(run.model, code, request, data.tokens, data.mask)
    found = from_one(lambda: {label: hit for label, key in keys.items() if key and (hit := cached(key))})
    order, run.jobs = run.jobs, [job for job in run.jobs if job.label not in found]
    made = walk(run, data, cut=None, progress=progress, journal=journal) if run.jobs else {}
    run.jobs = order
    for label, scores in made.items():
        if rank() == 0 and (key := keys.get(label)):
            store(key, scores)
    ordered = {label: replace(s, importance={n: s.importance[n] for n in run.groups}) for label, s in found.items()}
    return {job.label: (ordered | made)[job.label] for job in order if job.label not in run.refused}


@contextmanager
def blamed_rightly(model: nn.Module, data: Calibration | None, device: torch.device) -> Iterator[None]:
    """Context manager that raises ModelError instead of PluginError if the dense model itself is not finite."""
    try:
        yield
    except PluginError:
        if data is not None and offloaded(model) is None:
            with on_device(model, device):
                for tokens, mask in data.batches(logits=True):
                    refuse_not_finite(model, partial(forward, model, tokens, mask, use_cache=False))
        raise


def calibrated(
    source: Source,
    model: nn.Module,
    tokenizer: Any,
    text: CalibrationText,
    seed: int,
    progress: Progress | None,
    held_out: int = HELD_OUT,
) -> Calibration:
    """Return the calibration itself, or make one from a source; the model is on the device that samples.

    text: how many windows, and how long. Of several processes the first makes it for all.
    """

    def make() -> Calibration:
        if isinstance(source, Calibration):
            return source
        return calibration(
            source,
            model,
            tokenizer,
            samples=text.samples,
            seq_len=text.seq_len,
            held_out=held_out,
            seed=seed,
            text_column=text.text_column,
            progress=progress,
        )

    return from_one(make)
