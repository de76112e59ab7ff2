"""Weights and moments of a model, each process holding an equal part; slices of them travel, and come back as means.

A tensor lies as (elements, 3): its weight and the two moments of AdamW, cut into equal runs of elements, one for each
process (a DTensor's `Shard(0)`). A worker is sent the elements of its slice by those who hold them, trains them, and
sends them back; an element that several workers trained becomes their mean, one that none had stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from sspruner.compute.processes import rank, world

KINDS = 3  # weight, first moment, second moment
Places = Callable[[str], torch.Tensor]  # tensor -> which of its elements a worker has: int64, increasing; maybe none


class Shards:
    """A process's part of every tensor. Needs a process group; `tensors` are those of the first process.

    bytes_sent: to other processes, by this one, since it was made.
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
        """What this process's worker has of each tensor: fp32 (its elements, KINDS). workers: one for each process."""
        found = {}
        for name, part in self.parts.items():
            asked, mine = self._routes(name, workers)
            send = torch.cat([part[places] for places in asked])
            found[name] = self._exchange(send, [len(places) for places in asked], mine)
        return found

    def push(self, workers: Sequence[Places], values: dict[str, torch.Tensor]) -> None:
        """Give back what `pull` gave, trained: fp32 (its elements, KINDS). Raises KeyError for a tensor left out."""
        for name, part in self.parts.items():
            asked, mine = self._routes(name, workers)
            received = self._exchange(values[name], mine, [len(places) for places in asked])
            places = torch.cat(asked)
            holders = torch.bincount(places, minlength=len(part))[:, None]  # (elements here, 1)
            mean = torch.zeros_like(part).index_add_(0, places, received) / holders.clamp_min(1)
            part.copy_(torch.where(holders > 0, mean, part))

    def weights(self, name: str) -> torch.Tensor:
        """All of one tensor's weights, fp32 (elements,), in every process."""
        return self.sharded(name).full_tensor()[:, 0]

    def sharded(self, name: str) -> DTensor:
        """One tensor as torch.distributed knows it: checkpoints of it may be read by another number of processes."""
        size = torch.Size((self.sizes[name], KINDS))
        return DTensor.from_local(
            self.parts[name], self.mesh, [Shard(0)], run_check=False, shape=size, stride=(KINDS, 1)
        )

    def _bounds(self, name: str) -> list[int]:
        """Where each process's run of elements begins, and the end."""
        run = -(-self.sizes[name] // world())
        return [min(self.sizes[name], run * process) for process in range(world() + 1)]

    def _routes(self, name: str, workers: Sequence[Places]) -> tuple[list[torch.Tensor], list[int]]:
        """What each worker asks of the part that lies here, counted from its begin; how much this process's worker asks
        of each process."""
        bounds = self._bounds(name)
        low, high = bounds[rank()], bounds[rank() + 1]
        device = self.parts[name].device
        asked = []
        for number, worker in enumerate(workers):
            places = worker(name).to(device)
            if number == rank():
                mine = torch.searchsorted(places, torch.tensor(bounds, device=device)).diff().tolist()
            begin, end = torch.searchsorted(places, torch.tensor([low, high], device=device)).tolist()
            asked.append(places[begin:end] - low)
        return asked, mine

    def _exchange(self, send: torch.Tensor, given: list[int], taken: list[int]) -> torch.Tensor:
        """Rows to and from every process: so many are given to each, so many are taken."""
        received = send.new_empty(sum(taken), KINDS)
        distributed.all_to_all_single(received, send.contiguous(), taken, given)
        self.bytes_sent += (len(send) - given[rank()]) * KINDS * send.element_size()
        return received
