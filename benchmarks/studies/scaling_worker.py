"""One process of scaling.py under torchrun: rounds of TwIST without steps between. Arguments: keep, ends, repeats."""

import json
import sys
import time
from typing import Any

import torch
from torch import distributed

import sspruner
from sspruner.compute.processes import processes, rank, world
from sspruner.training.shards import Shards
from sspruner.training.subnet import Subnets
from sspruner.training.twist import Deal

keep, ends, repeats = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)


def seconds(job: Any) -> float:
    """Return the seconds that a job takes all processes."""
    distributed.barrier()
    begun = time.perf_counter()
    job()
    distributed.barrier()
    return time.perf_counter() - begun


with processes():
    model = sspruner.load("mamba2-books-4m", dtype="float32")[0]
    deal = Deal(model, ["head"], keep, ends, 0)
    subnets = Subnets(model, deal.draw("size", 1)[0])
    shards, plain = Shards(model.named_parameters(), torch.device("cpu")), torch.zeros(2**22)
    rounds, sends = [], []
    for number in range(repeats + 1):
        workers = [subnets.places(hand) for hand in deal.draw(f"round {number}", world())]
        rounds.append(seconds(lambda workers=workers: shards.push(workers, shards.pull(workers))))
        sends.append(seconds(lambda: distributed.all_to_all_single(torch.empty_like(plain), plain)))
    if rank() == 0:
        rate = 4 * plain.numel() * (world() - 1) / world() / min(sends[1:])
        middle = sorted(rounds[1:])[repeats // 2]
        print(json.dumps({"sent": shards.bytes_sent / (repeats + 1), "seconds": middle, "rate": rate}))
