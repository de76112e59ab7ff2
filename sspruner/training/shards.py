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
Message = tuple[list[torch.Tensor], list[torch.Tensor]]  # by process: rows that are sent, and places for what comes


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
        self._slice = torch.empty(0, KINDS, device=device)

    def routes(self, workers: Sequence[Places]) -> list[Route]:
        """Return what travels in a round, for `pull` and `push`. workers: one for each process."""
        return [self._route(names, workers) for names in self._groups()]

    def pull(self, routes: list[Route]) -> dict[str, torch.Tensor]:
        """Return this process's worker's elements of each tensor: fp32 (elements, KINDS). The next pull may overwrite
        them.
        """
        pulled: dict[str, torch.Tensor] = {}
        slices = self._slices([sum(map(sum, route.taken)) for route in routes])  # rows by process
        arrived = self._exchange(self._requested(route, rows) for route, rows in zip(routes, slices, strict=True))
        for route, rows, received in zip(routes, slices, arrived, strict=True):
            pieces = zip(route.names, _by_tensor(received, route.taken), strict=True)
            alone = len(route.names) == 1  # what came is in order
            pulled |= {route.names[0]: rows} if alone else {name: torch.cat(of) for name, of in pieces}
        return pulled

    def push(self, routes: list[Route], values: dict[str, torch.Tensor]) -> None:
        """Store the trained elements that `pull` returned: fp32 (elements, KINDS).

        Raises KeyError for a missing tensor.
        """
        arrived = self._exchange(self._trained(route, values) for route in routes)
        for route, received in zip(routes, arrived, strict=True):
            requests = zip(*route.requests, strict=True)  # by worker
            pieces = _by_tensor(received, route.given)
            for name, length, of, trained in zip(route.names, route.lengths, requests, pieces, strict=True):
                _put_means(_in_runs(self.parts[name], length), of, [_in_runs(rows, length) for rows in trained])

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

    def _requested(self, route: Route, rows: torch.Tensor) -> Message:
        """Return what each worker has in this process's part, and where in `rows`, its own slice, what comes is put."""
        gets = [*torch.split(rows, [sum(of) for of in route.taken])]
        return [self._gathered(route, worker, gets[rank()]) for worker in range(world())], gets

    def _gathered(self, route: Route, worker: int, own: torch.Tensor) -> torch.Tensor:
        """Return what one worker has in this process's part: (elements, KINDS). `own`: where this process wants its."""
        parts = [_in_runs(self.parts[name], length) for name, length in zip(route.names, route.lengths, strict=True)]
        requests, sizes = route.requests[worker], route.given[worker]
        if len(parts) == 1 and len(requests[0]) == len(parts[0]) and worker != rank():
            return self.parts[route.names[0]]  # all of it, as it lies there
        rows = own if worker == rank() else self._empty(sum(sizes))
        for part, runs, piece in zip(parts, requests, torch.split(rows, sizes), strict=True):
            torch.index_select(part, 0, runs, out=piece.view(-1, part.shape[1]))
        return rows

    def _trained(self, route: Route, values: dict[str, torch.Tensor]) -> Message:
        """Return what this process's worker has trained, by process, and where what the others trained is put."""
        sizes = zip(route.names, zip(*route.taken, strict=True), strict=True)
        pieces = zip(*(torch.split(values[name].contiguous(), list(of)) for name, of in sizes), strict=True)
        gives = [of[0] if len(of) == 1 else torch.cat(of) for of in pieces]
        gets = [gives[p] if p == rank() else self._empty(sum(of)) for p, of in enumerate(route.given)]
        return gives, gets

    def _slices(self, sizes: list[int]) -> tuple[torch.Tensor, ...]:
        """Return memory for this worker's slice, (elements, KINDS) each; that of the last round, if it was as large."""
        if len(self._slice) != sum(sizes):
            self._slice = self._empty(sum(sizes))
        return torch.split(self._slice, sizes)

    def _empty(self, elements: int) -> torch.Tensor:
        """Return memory for rows: fp32 (elements, KINDS)."""
        return next(iter(self.parts.values())).new_empty(elements, KINDS)

    def _exchange(self, messages: Iterable[Message]) -> Iterator[list[torch.Tensor]]:
        """Exchange rows with every process; yield what came of each message while the next one travels."""
        before: tuple[Any, ...] = ()
        for gives, gets in messages:
            now = (self._begun(gives, gets), gets, gives)  # gives are kept until they have arrived
            if before:
                yield _arrived(*before)
            before = now
        if before:
            yield _arrived(*before)

    def _begun(self, gives: list[torch.Tensor], gets: list[torch.Tensor]) -> list[Any]:
        """Begin to send and to receive what is not of this process itself."""
        steps = []
        for process in (p for p in range(world()) if p != rank()):
            self.bytes_sent += gives[process].nbytes
            for step, rows in ((distributed.irecv, gets[process]), (distributed.isend, gives[process])):
                if len(rows):
                    steps.append(distributed.P2POp(step, rows, process))
        return distributed.batch_isend_irecv(steps) if steps else []


def _arrived(works: list[Any], gets: list[torch.Tensor], gives: list[torch.Tensor]) -> list[torch.Tensor]:
    """Wait for a message."""
    for work in works:
        work.wait()
    return gets


def _put_means(part: torch.Tensor, requests: Sequence[torch.Tensor], trained: Sequence[torch.Tensor]) -> None:
    """Put in each run of a part the mean of the workers that have it; others stay. part, trained: (runs, columns)."""
    if len(requests) > 1 and all(len(runs) == len(part) for runs in requests):  # as below, in fewer passes
        torch.add(trained[0], trained[1], out=part)
        for rows in trained[2:]:
            part.add_(rows)
        part.div_(len(requests))
        return
    holders = torch.zeros(len(part), dtype=torch.long, device=part.device)
    for runs, rows in zip(requests, trained, strict=True):
        first = holders[runs] == 0
        if bool(first.all()):
            part.index_copy_(0, runs, rows)
        else:
            part.index_fill_(0, runs[first], 0)
            part.index_add_(0, runs, rows)
        holders[runs] += 1
    if len(holders) and int(holders.max()) > 1:
        part.div_(holders.clamp_min(1)[:, None])


def _by_tensor(rows: list[torch.Tensor], sizes: list[list[int]]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Split rows that came from all processes, sizes by process and tensor; yield pieces by tensor and process."""
    return zip(*(torch.split(of, by_tensor) for of, by_tensor in zip(rows, sizes, strict=True)), strict=True)


def _in_runs(rows: torch.Tensor, length: int) -> torch.Tensor:
    """Return rows of elements as rows of runs: (runs, length * KINDS)."""
    return rows.view(-1, length * KINDS)


def _turned(table: list[list[Any]]) -> list[list[Any]]:
    """Return the columns of a table as its rows."""
    return [list(column) for column in zip(*table, strict=True)]
