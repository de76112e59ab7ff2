"""Sharded weights and optimizer moments: each process holds an equal part; workers pull slices and push back means.

A tensor is stored as (elements, 3): its weight and the two moments of AdamW, split into equal runs of elements, one for
each process (a DTensor's `Shard(0)`). A worker pulls the elements of its slice from their processes, trains them, and
pushes them back; an element trained by several workers becomes their mean, one trained by none is not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from sspruner.compute.processes import rank, world

KINDS = 3  # weight, first moment, second moment
Places = Callable[[str], torch.Tensor]  # tensor -> indices of a worker's elements: int64, increasing; may be empty


class Shards:
    """One process's part of every tensor. Needs a process group; `tensors` are taken from the first process.

    bytes_sent: sent to other processes by this one so far.
    """

    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor]], device: torch.device) -> None:
        self.mesh = init_device_mesh(device.type, (world(),))
        self.sizes: dict[str, int] = {}
        self.parts: dict[str, torch.Tensor] = {}  # (elements here, KINDS), fp32
        self.bytes_sent = 0
        for name, value in tensors:
            rows = torch.zeros(value.numel(), KINDS, device=device)
            rows[:, 0] = value.detach().flatten()
            self.sizes[name] = len(rows)
            self.parts[name] = distribute_tensor(rows, self.mesh, [Shard(0)]).to_local().clone()

    def pull(self, workers: Sequence[Places]) -> dict[str, torch.Tensor]:
        """Return this process's worker's elements of each tensor: fp32 (elements, KINDS). workers: one for each
        process.
        """
        pulled = {}
        for name, part in self.parts.items():
            requests, mine = self._routes(name, workers)
            send = torch.cat([part[places] for places in requests])
            pulled[name] = self._exchange(send, [len(places) for places in requests], mine)
        return pulled

    def push(self, workers: Sequence[Places], values: dict[str, torch.Tensor]) -> None:
        """Store the trained elements that `pull` returned: fp32 (elements, KINDS).

        Raises KeyError for a missing tensor.
        """
        for name, part in self.parts.items():
            requests, mine = self._routes(name, workers)
            received = self._exchange(values[name], mine, [len(places) for places in requests])
            places = torch.cat(requests)
            holders = torch.bincount(places, minlength=len(part))[:, None]  # (elements here, 1)
            mean = torch.zeros_like(part).index_add_(0, places, received) / holders.clamp_min(1)
            part.copy_(torch.where(holders > 0, mean, part))

    def weights(self, name: str) -> torch.Tensor:
        """Return all weights of one tensor, fp32 (elements,), in every process."""
        return self.sharded(name).full_tensor()[:, 0]

    def sharded(self, name: str) -> DTensor:
        """Return one tensor as a DTensor, whose checkpoints can be read by another number of processes."""
        size = torch.Size((self.sizes[name], KINDS))
        return DTensor.from_local(
            self.parts[name], self.mesh, [Shard(0)], run_check=False, shape=size, stride=(KINDS, 1)
        )

    def _bounds(self, name: str) -> list[int]:
        """Return the first element of each process's run, and the end."""
        run = -(-self.sizes[name] // world())
        return [min(self.sizes[name], run * process) for process in range(world() + 1)]

    def _routes(self, name: str, workers: Sequence[Places]) -> tuple[list[torch.Tensor], list[int]]:
        """Return each worker's elements in this process's part, counted from its start, and the number of elements that
        this process's worker needs from each process.
        """
        bounds = self._bounds(name)
        low, high = bounds[rank()], bounds[rank() + 1]
        device = self.parts[name].device
        requests = []
        for number, worker in enumerate(workers):
            places = worker(name).to(device)
            if number == rank():
                mine = torch.searchsorted(places, torch.tensor(bounds, device=device)).diff().tolist()
            begin, end = torch.searchsorted(places, torch.tensor([low, high], device=device)).tolist()
            requests.append(places[begin:end] - low)
        return requests, mine

    def _exchange(self, send: torch.Tensor, sent: list[int], received_counts: list[int]) -> torch.Tensor:
        """Exchange rows with every process. given, taken: number of rows sent to and received from each."""
        received = send.new_empty(sum(received_counts), KINDS)
        distributed.all_to_all_single(received, send.contiguous(), received_counts, sent)
        self.bytes_sent += (len(send) - sent[rank()]) * KINDS * send.element_size()
        return received
