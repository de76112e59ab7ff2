"""Run lm-eval's tasks through its HFLM on a model in memory; a pruned model needs no other code.

Needs the optional extra `sspruner[eval]`. lm-eval's results are split into items again, so that intervals and
comparisons are computed as for the other metrics: means of items, and perplexities from sums over items.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from sspruner.errors import InputError, install

BOOTSTRAP = 1000  # lm-eval's bootstrap resamples, for metrics that are not means of items


@dataclass(frozen=True)
class TaskMetric:
    """One metric of a task.

    part, count: of each item, fp64 (items,); the metric is sum(part) / sum(count), and for a perplexity the exp of
    that. None for metrics of another form, which have lm-eval's value and standard error.
    """

    name: str
    value: float
    items: int
    part: torch.Tensor | None = None
    count: torch.Tensor | None = None
    is_perplexity: bool = False
    stderr: float = math.nan


def check_harness() -> None:
    """Raise InputError if lm-eval cannot be imported."""
    try:
        with _quiet():
            import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise InputError(f"tasks need lm-eval, which is not installed ({error}): {install('eval')}") from None


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    include_path: str | Path | None = None,
    batch_size: int = 8,
) -> list[TaskMetric]:
    """Return every metric of every task, in lm-eval's order. limit: number of items of each task, from the first.

    include_path: a folder with custom tasks in YAML. Raises InputError for a task that cannot be run.
    """
    check_harness()
    if tokenizer is None:
        raise InputError("tasks need a tokenizer, and this model has none")
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    try:
        with _quiet():
            output: Any = lm_eval.simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=list(tasks),
                task_manager=_manager(tuple(tasks), None if include_path is None else str(include_path)),
                limit=limit,
                bootstrap_iters=BOOTSTRAP,
                log_samples=True,
            )
    except Exception as error:  # lm-eval, its tasks and datasets may fail in any way
        brief = " ".join(str(error).split())[:300]
        raise InputError(f"tasks {','.join(tasks)}: lm-eval cannot run them: {brief}") from error
    metrics = []
    for task, samples in output["samples"].items():
        for key, value in output["results"][task].items():
            metric, comma, chosen = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                rows = sorted((s for s in samples if s["filter"] == chosen), key=lambda s: s["doc_id"])
                name = f"{task}/{metric}" + ("" if chosen == "none" else f",{chosen}")
                stderr = output["results"][task].get(f"{metric}_stderr,{chosen}")
                metrics.append(_metric(name, value, [row.get(metric) for row in rows], stderr))
    return metrics


@lru_cache(maxsize=1)
def _manager(tasks: tuple[str, ...], include_path: str | None) -> Any:
    """Return lm-eval's task manager, of `include_path` alone if that has all tasks: its own index is slow to read."""
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        manager = TaskManager(include_path=include_path, include_defaults=False)
        if set(tasks) <= set(manager.all_tasks):
            return manager
    return TaskManager(include_path=include_path)


def _metric(name: str, value: float, items: list[Any], stderr: Any) -> TaskMetric:
    """Split a metric into items, in the form that reproduces the value of lm-eval."""
    error = float(stderr) if isinstance(stderr, (int, float)) else math.nan
    if items and all(isinstance(item, (int, float)) for item in items):
        part, count = torch.tensor(items, dtype=torch.float64), torch.ones(len(items), dtype=torch.float64)
    elif items and all(isinstance(item, (tuple, list)) and len(item) == 2 for item in items):
        part, count = torch.tensor(items, dtype=torch.float64).unbind(1)
    else:
        return TaskMetric(name, float(value), len(items), stderr=error)
    forms = ((part, False), (-part, True), (-part / math.log(2), False))  # mean, perplexity, bits
    for sums, is_perplexity in forms:
        ratio = float(sums.sum() / count.sum())
        reproduced = math.exp(min(ratio, 700)) if is_perplexity else ratio
        if math.isclose(reproduced, value, rel_tol=1e-9, abs_tol=1e-12):
            return TaskMetric(name, float(value), len(items), sums, count, is_perplexity, error)
    return TaskMetric(name, float(value), len(items), stderr=error)


@contextlib.contextmanager
def _quiet() -> Any:
    """Keep lm-eval's bars, log messages and prints off the terminal; errors are raised."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
