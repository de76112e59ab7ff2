"""Time the exchange of a round of TwIST beside a bare transfer of its bytes, with gloo on this machine.

Under torchrun this file is one process: it pulls a slice of a model and pushes it back, without steps between, in turns
with two all-to-alls of buffers that are packed already. Both are timed until all processes are done.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import torch
from common import Made, random_model, span, table, timed, torchrun
from torch import distributed

import sspruner
from sspruner.benchmarking.statistics import median_interval
from sspruner.compute.processes import processes, rank, world
from sspruner.training.shards import KINDS, Places, Shards
from sspruner.training.subnet import Subnets
from sspruner.training.twist import Deal


def exchange(shards: Shards, workers: list[Places]) -> None:
    """Do what a round does before and after its steps."""
    routes = shards.routes(workers)
    shards.push(routes, shards.pull(routes))


def bare(there: torch.Tensor, back: torch.Tensor, given: list[int], taken: list[int]) -> None:
    """Send as many rows there and back, from and to buffers that exist. given, taken: rows by process."""
    distributed.all_to_all_single(back, there, taken, given)
    distributed.all_to_all_single(there, back, given, taken)


def by_process(tables: list[list[list[int]]]) -> list[int]:
    """Return the sums of tables of numbers by process and tensor."""
    return [sum(map(sum, rows)) for rows in zip(*tables, strict=True)]


def together(job: Callable[[], Any]) -> float:
    """Return the seconds until all processes have done a job."""
    distributed.barrier()
    return timed(lambda: (job(), distributed.barrier()))


def one_process(name: str, repeats: int) -> None:
    """Print the elements of a slice, the bytes that this process sends in a round, and seconds by repeat."""
    with processes():
        big: dict[str, int] = {"hidden": 768, "heads": 24, "layers": 24}
        model = random_model(**big) if name == "130M" else sspruner.load(name, dtype="float32")[0]
        deal = Deal(model, ["head"], 0.5, 1, 0)
        subnets, shards = Subnets(model, deal.draw("size", 1)[0]), Shards(model.named_parameters(), torch.device("cpu"))
        found: dict[str, list[float]] = {"exchange": [], "bare": []}
        for number in range(repeats + 1):
            workers = [subnets.places(hand) for hand in deal.draw(f"round {number}", world())]
            routes = shards.routes(workers)
            sizes = [by_process([r.given for r in routes]), by_process([r.taken for r in routes])]
            jobs = {"exchange": partial(exchange, shards, workers)}
            jobs["bare"] = partial(bare, *(torch.ones(sum(of), KINDS) for of in sizes), *sizes)
            for name in [*jobs][:: 1 if number % 2 else -1]:
                found[name].append(together(jobs[name]))
        sent = shards.bytes_sent / (repeats + 1)
        if rank() == 0:
            print(json.dumps({"slice": sum(sizes[1]), "sent": sent} | {name: took[1:] for name, took in found.items()}))


def tables(s: Any) -> Made:
    """Return bytes and times of an exchange by model and number of workers. Settings: models, workers, repeats."""
    rows = []
    for name, workers in product(s.models, s.workers):
        done = torchrun(workers, "studies.exchange", name, s.repeats)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        found = json.loads(done.stdout.strip().splitlines()[-1])
        formula = 2 * 4 * KINDS * found["slice"] * (workers - 1) / workers
        ratios = [a / b for a, b in zip(found["exchange"], found["bare"], strict=True)]
        times = [f"{1000 * median(found[name]):.0f}" for name in ("exchange", "bare")]
        sent = [f"{found['sent']:,.0f}", f"{formula:,.0f}"]
        rows.append([f"{name}, {workers}", *sent, *times, span(median_interval(ratios))])
    head = ["model, workers", "bytes a worker sends", "2 · 12 · slice · (m − 1) / m"]
    head += ["ms", "ms, bare", "ratio (95 % interval)"]
    made = table("An exchange of a round, half of the heads, gloo; bare: the same bytes in two all-to-alls", head, rows)
    return [made], f"medians of {s.repeats}, in turns; seed 0"


if __name__ == "__main__":
    one_process(sys.argv[1], int(sys.argv[2]))
