"""Sharded weights and optimizer moments: each process holds an equal part; workers pull slices and push back means.

A tensor is stored as (elements, 3): its weight and the two moments of AdamW, split into equal parts, one for each
process (a DTensor's `Shard(0)`). A worker pulls the elements of its slice from their processes, trains them, and pushes
them back; an element trained by several workers becomes their mean, one trained by none is not changed.

Elements travel as runs, which are as long as the cuts and the parts allow, and small tensors together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from sspruner.compute.processes import rank, world

KINDS = 3  # weight, first moment, second moment
TOGETHER = 2**18  # elements of tensors that travel together; more need more memory, fewer more messages


@dataclass(frozen=True)
class Runs:
    """Elements of a flattened tensor, as runs of one length.

    numbers: int64 (runs,), increasing; may be empty. Run r is the elements r * length to (r + 1) * length - 1.
    """

    numbers: torch.Tensor
    length: int

    def shorter(self, length: int) -> torch.Tensor:
        """Return the numbers of the same elements in runs of a length that divides theirs."""
        if length == self.length:
            return self.numbers
        pieces = torch.arange(self.length // length, device=self.numbers.device)
        return (self.numbers[:, None] * len(pieces) + pieces).flatten()

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """Return these elements of a flattened tensor: (elements,)."""
        return values.view(-1, self.length).index_select(0, self.numbers.to(values.device)).flatten()


Places = Callable[[str], Runs]  # tensor -> a worker's elements of it


@dataclass(frozen=True)
class Route:
    """What travels of some tensors in one round: of this process's part to all workers, to its own one from all parts.

    lengths: of the runs, by tensor. requests: runs in this process's part, counted from its start, by worker and
    tensor. given: number of elements in them. taken: number of elements that come, by process and tensor.
    """

    names: list[str]
    lengths: list[int]
    requests: list[list[torch.Tensor]]
    given: list[list[int]]
    taken: list[list[int]]


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

    def routes(self, workers: Sequence[Places]) -> list[Route]:
        """Return what travels in a round, for `pull` and `push`. workers: one for each process."""
        return [self._route(names, workers) for names in self._groups()]

    def pull(self, routes: list[Route]) -> dict[str, torch.Tensor]:
        """Return this process's worker's elements of each tensor: fp32 (elements, KINDS)."""
        pulled: dict[str, torch.Tensor] = {}
        for route, received in self._exchange((route, self._requested(route), False) for route in routes):
            pieces = zip(route.names, _by_tensor(received, route.taken), strict=True)
            alone = len(route.names) == 1  # what came is in order
            pulled |= {route.names[0]: received} if alone else {name: torch.cat(of) for name, of in pieces}
        return pulled

    def push(self, routes: list[Route], values: dict[str, torch.Tensor]) -> None:
        """Store the trained elements that `pull` returned: fp32 (elements, KINDS).

        Raises KeyError for a missing tensor.
        """
        for route, received in self._exchange((route, _packed(route, values), True) for route in routes):
            requests = zip(*route.requests, strict=True)  # by worker
            pieces = _by_tensor(received, route.given)
            for name, length, of, rows in zip(route.names, route.lengths, requests, pieces, strict=True):
                part = _in_runs(self.parts[name], length)
                holders = torch.bincount(torch.cat(of), minlength=len(part))[:, None]  # (runs here, 1)
                part.masked_fill_(holders > 0, 0)
                for runs, trained in zip(of, rows, strict=True):
                    part.index_add_(0, runs, _in_runs(trained, length))
                part.div_(holders.clamp_min(1))

    def weights(self, name: str) -> torch.Tensor:
        """Return all weights of one tensor, fp32 (elements,), in every process."""
        return self.sharded(name).full_tensor()[:, 0]

    def sharded(self, name: str) -> DTensor:
        """Return one tensor as a DTensor, whose checkpoints can be read by another number of processes."""
        size = torch.Size((self.sizes[name], KINDS))
        return DTensor.from_local(
            self.parts[name], self.mesh, [Shard(0)], run_check=False, shape=size, stride=(KINDS, 1)
        )

    def _groups(self) -> list[list[str]]:
        """Return tensors that travel together: one large one, or several small ones."""
        groups: list[list[str]] = []
        filled = TOGETHER
        for name, size in self.sizes.items():
            if filled + size > TOGETHER:
                groups.append([])
                filled = 0
            groups[-1].append(name)
            filled += size
        return groups

    def _route(self, names: list[str], workers: Sequence[Places]) -> Route:
        lengths, requests, taken = list[int](), list[list[torch.Tensor]](), list[list[int]]()
        for name in names:
            part, places = self.parts[name], [worker(name) for worker in workers]
            size = -(-self.sizes[name] // world())  # of every part but the last ones
            length = math.gcd(size, *(runs.length for runs in places))
            bounds = [min(process * size, self.sizes[name]) // length for process in range(world() + 1)]
            low, ends = bounds[rank()], torch.tensor(bounds, device=part.device)
            numbers = [runs.shorter(length).to(part.device) for runs in places]
            cuts = [torch.searchsorted(runs, ends).tolist() for runs in numbers]  # by worker and process
            here = [runs[cut[rank()] : cut[rank() + 1]] for runs, cut in zip(numbers, cuts, strict=True)]
            requests.append([runs - low for runs in here])
            taken.append([length * (after - before) for before, after in pairwise(cuts[rank()])])
            lengths.append(length)
        given = [[length * len(runs) for runs in of] for length, of in zip(lengths, requests, strict=True)]
        return Route(names, lengths, *(_turned(of) for of in (requests, given, taken)))

    def _requested(self, route: Route) -> torch.Tensor:
        """Return what the workers have in this process's part: rows by worker and tensor."""
        parts = [_in_runs(self.parts[name], length) for name, length in zip(route.names, route.lengths, strict=True)]
        send = parts[0].new_empty(sum(map(sum, route.given)), KINDS)
        places = iter(torch.split(send, [size for sizes in route.given for size in sizes]))
        for requests in route.requests:
            for part, runs in zip(parts, requests, strict=True):
                torch.index_select(part, 0, runs, out=next(places).view(-1, part.shape[1]))
        return send

    def _exchange(self, messages: Iterable[tuple[Route, torch.Tensor, bool]]) -> Iterator[tuple[Route, torch.Tensor]]:
        """Exchange rows with every process; yield what came of each message while the next one travels.

        messages: what is sent, and whether it is on its way back.
        """
        before: tuple[Any, ...] = ()
        for route, send, back in messages:
            given, taken = (route.taken, route.given) if back else (route.given, route.taken)
            sent, sizes = [sum(of) for of in given], [sum(of) for of in taken]
            received = send.new_empty(sum(sizes), KINDS)
            work = distributed.all_to_all_single(received, send, sizes, sent, async_op=True)
            self.bytes_sent += (len(send) - sent[rank()]) * KINDS * send.element_size()
            now = (work, route, received, send)  # send is kept until it has arrived
            if before:
                yield _arrived(*before)
            before = now
        if before:
            yield _arrived(*before)


def _arrived(work: Any, route: Route, received: torch.Tensor, send: torch.Tensor) -> tuple[Route, torch.Tensor]:
    """Wait for a message."""
    work.wait()
    return route, received


def _packed(route: Route, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return what this process's worker has trained: rows by process and tensor."""
    if len(route.names) == 1:
        return values[route.names[0]].contiguous()  # in order already
    sizes = zip(route.names, zip(*route.taken, strict=True), strict=True)
    pieces = [torch.split(values[name], list(of)) for name, of in sizes]  # by tensor and process
    return torch.cat([piece for of in zip(*pieces, strict=True) for piece in of])


def _by_tensor(rows: torch.Tensor, sizes: list[list[int]]) -> list[tuple[torch.Tensor, ...]]:
    """Split rows that came from all processes, sizes by process and tensor; return pieces by tensor and process."""
    pieces = torch.split(rows, [size for of in sizes for size in of])
    return [pieces[number :: len(sizes[0])] for number in range(len(sizes[0]))]


def _in_runs(rows: torch.Tensor, length: int) -> torch.Tensor:
    """Return rows of elements as rows of runs: (runs, length * KINDS)."""
    return rows.view(-1, length * KINDS)


def _turned(table: list[list[Any]]) -> list[list[Any]]:
    """Return the columns of a table as its rows."""
    return [list(column) for column in zip(*table, strict=True)]
