"""Processes of one run: those that torchrun started, or this one alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from sspruner.errors import InputError, ProcessError, SSPrunerError

T = TypeVar("T")

PATIENCE = timedelta(days=1)  # timeout: others may wait while one works; a lost process is noticed at once
FAILED, CODE = "sspruner/failed", "sspruner/code"  # keys: how many processes failed; the exit code of the first one


def started_together() -> bool:
    """Return whether torchrun started several processes."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


@contextmanager
def processes() -> Iterator[None]:
    """Context manager that joins the processes that torchrun started: gloo on the CPU, and nccl on GPUs.

    "cuda" is this process's own GPU from here on. Raises InputError if the processes cannot connect.
    """
    if not started_together() or distributed.is_initialized():
        yield
        return
    store, number, count = _meeting()
    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", number)) % gpus)
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    with lost_peers():
        distributed.init_process_group(backend, store=store, rank=number, world_size=count, timeout=PATIENCE)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def rank() -> int:
    """Return the number of this process; 0 if it is alone."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world() -> int:
    """Return the number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def barrier() -> None:
    """Wait for all processes."""
    gathered(None)


def total(value: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over processes, in place. It has the same shape in all of them."""
    if world() > 1:
        with lost_peers():
            distributed.all_reduce(value)
    return value


def gathered(value: T) -> list[T]:
    """Return the values of all processes, in the order of their ranks."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    with lost_peers():
        distributed.all_gather_object(values, value)
    return values


def from_one(make: Callable[[], T], source: int = 0) -> T:
    """Call `make` in one process and return its result, or raise its SSPrunerError, in all of them."""
    if world() == 1:
        return make()
    result: list[Any] = [None, None]
    if rank() == source:
        try:
            result[0] = make()
        except SSPrunerError as error:
            result[1] = error
    with lost_peers():
        distributed.broadcast_object_list(result, src=source)
    if result[1] is not None:
        raise result[1]
    value: T = result[0]
    return value


@contextmanager
def lost_peers() -> Iterator[None]:
    """Context manager that raises ProcessError if another process does not answer any more."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        brief = str(error).strip().splitlines()[0].rpartition("] ")[2]
        raise ProcessError(
            f"another process of this run is gone ({brief}); was it killed, or out of memory?"
        ) from error


def fail(code: int, say: Callable[[], None]) -> int:
    """Print why this run fails, unless another of its processes has. Returns the exit code of all.

    A failing process has to call this while it is still connected: the others take a lost connection without it for a
    process that was killed.
    """
    try:
        store = _meeting()[0] if started_together() else None
    except InputError:
        store = None
    if store is None:
        say()
        return code
    try:
        if store.add(FAILED, 1) == 1:
            say()
            store.set(CODE, str(code))
            return code
        store.wait([CODE], timedelta(seconds=30))  # torchrun ends all processes with the first: wait for its message
        return int(store.get(CODE))
    except RuntimeError:  # the process with the store has ended
        return code


@cache
def _meeting() -> tuple[Any, int, int]:
    """Return the store shared by all processes, the rank of this one, and their number."""
    try:
        store, number, count = next(iter(rendezvous("env://", timeout=PATIENCE)))
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"RANK and WORLD_SIZE say that this is one of several processes, and they cannot meet "
            f"({str(error).splitlines()[0]}); start them with torchrun"
        ) from error
    if os.environ.get("LOCAL_WORLD_SIZE") == str(count):  # one torchrun: it keeps the store when it starts all again
        store = PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    return store, number, count
