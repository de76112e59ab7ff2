"""The processes of one run: as many as torchrun started, or this one alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous


@contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Join the other processes that torchrun started, inside the block; nccl on GPUs, gloo elsewhere."""
    if "RANK" not in os.environ or distributed.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # "cuda" is this process's own from here on
    store, number, count = next(rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(count):  # one torchrun: it keeps the store when it starts all again
        store = PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=store, rank=number, world_size=count)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def rank() -> int:
    """The number of this process; 0 where it is alone."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def barrier() -> None:
    """Wait for all."""
    if world() > 1:
        distributed.barrier()


def total(value: torch.Tensor) -> torch.Tensor:
    """The sum over processes, in place."""
    if world() > 1:
        distributed.all_reduce(value)
    return value
