"""A group of processes, started once, that runs functions one after another, with gloo."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import distributed

import sspruner

MOST = 4
PRELOADED = ["pytest", "hypothesis", "torch.distributed", "datasets", "sspruner.testing.models"]
FAMILIES = ("mamba", "mamba2", "zamba2", "granitemoehybrid", "qwen3_next", "kimi_linear")
PRELOADED += [f"transformers.models.{name}.modeling_{name}" for name in FAMILIES]
Together = Callable[..., list[Any]]


def work(number: int, count: int, meeting: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Run one process: join the others, call the function, leave. Errors of sspruner are returned."""
    torch.set_num_threads(1)
    store = distributed.FileStore(meeting, count)
    patience = timedelta(minutes=2)  # a process that waits for ever would be a test that never ends
    distributed.init_process_group("gloo", store=store, rank=number, world_size=count, timeout=patience)
    distributed.barrier()  # who leaves while another still connects cuts it off
    try:
        return function(*arguments)
    except sspruner.SSPrunerError as error:
        return error
    finally:
        distributed.destroy_process_group()


@contextmanager
def group(folder: Path) -> Iterator[Together]:
    """Return together(count, function, *arguments), which returns the results of `count` processes.

    A process starts when it is first needed. All are forks of one that has imported what takes as long as many tests.
    """
    calls = iter(range(10**6))
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    pools = [ProcessPoolExecutor(1, mp_context=context) for _ in range(MOST)]

    def call(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        meeting = str(folder / str(next(calls)))
        futures = [pools[number].submit(work, number, count, meeting, function, arguments) for number in range(count)]
        return [future.result(timeout=300) for future in futures]

    yield call
    for pool in pools:
        pool.shutdown()


def went_well(results: list[Any]) -> list[Any]:
    """Return the results as `together` does; fail if a process returned an error."""
    assert not [result for result in results if isinstance(result, sspruner.SSPrunerError)], results
    return results
