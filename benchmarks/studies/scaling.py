"""Training beyond one machine, on paper: bytes, memory, time of 1.3B to 70B on 8 to 512 GPUs; the formulas checked.

    python benchmarks/scaling.py --threads 1
    python benchmarks/scaling.py --quick

Operations and parameters are counted on the meta device, of the model and of its slice; rates are assumptions that the
page states. The checks run the reference model: the same formulas, against the clock, in turns, on this machine.
"""

from __future__ import annotations

import copy
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import deliver, options, progress, provenance, table

import sspruner
from sspruner.benchmarking.ceiling import token_operations
from sspruner.benchmarking.footprint import footprint
from sspruner.benchmarking.shapes import shape_config
from sspruner.surgery.slice import slice_model
from sspruner.training.twist import Deal

MEMORY, FLOPS, INSIDE, BETWEEN, NODE = 80e9, 0.4 * 989e12, 0.7 * 450e9, 0.7 * 50e9, 8  # of one H100; bytes a second
BATCH, EVERY, KEEP, ENDS, TOKENS, OBSERVED = 2**19, 15, 0.5, 2, 1e9, (128, 2048)
GPUS = (8, 64, 512)
WIDE = {"7B": (4096, 64, 8), "70B": (10240, 110, 8)}  # hidden size, layers, groups; the first is Codestral Mamba's


def sizes() -> dict[str, Any]:
    """Label -> config."""
    found = {"1.3B": shape_config("mamba2-1.3b"), "2.7B": shape_config("mamba2-2.7b")}
    for label, (width, layers, groups) in WIDE.items():
        config = copy.deepcopy(found["2.7B"])
        config.hidden_size, config.num_hidden_layers, config.n_groups = width, layers, groups
        config.num_heads, config.vocab_size = 2 * width // 64, 32768
        found[label] = config
    return found


def counted(model: Any) -> tuple[int, int]:
    """Parameters, and operations of a forward for one token."""
    return sum(p.numel() for p in model.parameters()), token_operations(model, footprint(model, sspruner.trace(model)))


def sliced(model: Any, ends: int = ENDS, keep: float = KEEP) -> Any:
    """A worker's model."""
    deal, made = Deal(model, ["head"], keep, ends, 0), copy.deepcopy(model)
    slice_model(made, deal.draw("size", 1)[0], deal.graph)
    return made


def network(gpus: int) -> float:
    """Bytes a second that a GPU sends to others of its run."""
    return INSIDE if gpus <= NODE else BETWEEN


def rows(config: Any, label: str) -> tuple[list[list[str]], list[list[str]], list[str]]:
    """Recovery by distillation and TwIST on every number of GPUs; calibration."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    P, work = counted(model)
    S, part = counted(sliced(model))
    heads = min(g.units for g in sspruner.trace(model).on_axis("head").values())
    distil, twist = [], []
    for gpus in GPUS:
        others = (gpus - 1) / gpus
        # fp32 weights, gradients, two moments; buckets of gradients; bf16 copies; the teacher in bf16.
        held = (16 + 4 + 2 + 2) * P
        compute = (3 + 1) * work * BATCH / gpus / FLOPS
        sent = 2 * 4 * P * others
        step = compute + sent / network(gpus)
        distil.append(
            [
                f"{label}, {gpus} GPUs",
                f"{held / 1e9:,.0f}{'' if held < MEMORY else ' (too much)'}",
                f"{sent / 1e9:,.1f}",
                f"{compute:.2f}",
                f"{sent / network(gpus):.2f}",
                f"{TOKENS / BATCH * step / 3600:,.2f}" if held < MEMORY else "–",
            ]
        )
        held = (16 + 2) * S + 12 * P / gpus
        compute = 3 * part * BATCH / gpus / FLOPS
        sent = 2 * 12 * S * others
        step = compute + sent / network(gpus) / EVERY
        fits = held < MEMORY and gpus <= heads
        twist.append(
            [
                f"{label}, {gpus} workers",
                f"{S / P:.2f}",
                f"{held / 1e9:,.0f}{'' if held < MEMORY else ' (too much)'}",
                f"{sent / 1e9:,.1f}",
                f"{compute:.2f}",
                f"{sent / network(gpus) / EVERY:.2f}",
                f"{TOKENS / BATCH * step / 3600:,.2f}"
                if fits
                else f"refused: {gpus} > {heads} heads"
                if gpus > heads
                else "–",
            ]
        )
    tokens = OBSERVED[0] * OBSERVED[1]
    seconds = [2 * work * tokens / gpus / FLOPS for gpus in (1, *GPUS[:2])]
    calibration = [label, f"{P / 1e9:.2f}", f"{work / 1e9:.2f}", f"{2 * P / 1e9:,.0f}", *(f"{s:,.1f}" for s in seconds)]
    return distil, twist, calibration


def in_turns(jobs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each, measured in turns."""
    took: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(repeats + 1):
        for name, job in jobs.items():
            begun = time.perf_counter()
            job()
            if turn:
                took[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in took.items()}


def step_of(model: Any, tokens: torch.Tensor, teacher: Any = None) -> Callable[[], Any]:
    """A training step of the package, without the optimiser."""
    from sspruner.training.distil import distillation
    from sspruner.training.gradual import likelihood

    objective = distillation(teacher) if teacher is not None else likelihood

    def step() -> None:
        model.zero_grad()
        torch.autograd.backward(objective(model, tokens)[0])

    return step


WORKER = """
import json, os, sys, time, torch, sspruner
from sspruner.processes import processes, rank, world
from sspruner.train.shards import Shards
from sspruner.train.subnet import Subnets
from sspruner.train.twist import Deal
from torch import distributed
torch.set_num_threads(1)
device = torch.device("cpu")
with processes():
    model = sspruner.load("mamba2-books-4m", dtype="float32")[0]
    deal = Deal(model, ["head"], {keep}, {ends}, 0)
    subnets, shards = Subnets(model, deal.draw("size", 1)[0]), Shards(model.named_parameters(), device)
    plain = torch.zeros(2**22)
    took = dict(round=[], plain=[])
    for number in range({repeats} + 1):
        workers = [subnets.places(hand) for hand in deal.draw(f"round {{number}}", world())]
        distributed.barrier(); begun = time.perf_counter()
        shards.push(workers, shards.pull(workers))
        distributed.barrier(); took["round"].append(time.perf_counter() - begun); begun = time.perf_counter()
        distributed.all_to_all_single(torch.empty_like(plain), plain)
        distributed.barrier(); took["plain"].append(time.perf_counter() - begun)
    if rank() == 0:
        others = (world() - 1) / world()
        rate = 4 * plain.numel() * others / min(took["plain"][1:])
        seconds = sorted(took["round"][1:])[{repeats} // 2]
        print(json.dumps(dict(sent=shards.bytes_sent / ({repeats} + 1), seconds=seconds, rate=rate)))
"""


def exchanged(workers: int, repeats: int, folder: Path) -> dict[str, float]:
    """A round without steps between: bytes that one process sends, seconds, and the rate of a plain all-to-all."""
    import json

    file = folder / "scaling_worker.py"
    file.write_text(WORKER.format(keep=KEEP, ends=1, repeats=repeats), encoding="utf-8")
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, f"--nproc-per-node={workers}", str(file)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def checks(repeats: int, folder: Path) -> list[list[str]]:
    """The formulas on the reference model: predicted, measured, and their ratio."""
    model, _ = sspruner.load("mamba2-books-4m", dtype="float32")
    tokens = torch.randint(4096, (4, 256), generator=torch.Generator().manual_seed(0))
    cut = {keep: sliced(model, 1, keep) for keep in (0.75, 0.5, 0.25)}
    jobs = {"dense": step_of(model, tokens), "distil": step_of(copy.deepcopy(model), tokens, copy.deepcopy(model))}
    jobs |= {f"keep {keep}": step_of(small, tokens) for keep, small in cut.items()}
    with torch.no_grad():
        still = copy.deepcopy(model)
    jobs["forward"] = torch.no_grad()(lambda: still(input_ids=tokens, use_cache=False))
    took = in_turns(jobs, repeats)
    work = counted(model)[1]
    found = [
        ("a step / a forward", 3.0, took["dense"] / took["forward"]),
        ("a step of distillation / a plain one", 4 / 3, took["distil"] / took["dense"]),
    ]
    for keep, small in cut.items():
        predicted = counted(small)[1] / work
        found.append(
            (f"a step of a slice of {keep} of the heads / a dense one", predicted, took[f"keep {keep}"] / took["dense"])
        )
    S = counted(cut[0.5])[0]
    for workers in (2, 4):
        seen = exchanged(workers, repeats, folder)
        sent = 2 * 12 * S * (workers - 1) / workers
        found.append((f"bytes that a worker sends in a round, {workers} workers", sent, seen["sent"]))
        found.append((f"seconds of an exchange, {workers} workers", sent / seen["rate"], seen["seconds"]))
    return [
        [what, f"{a:,.3g}" if a < 1e4 else f"{a:,.0f}", f"{b:,.3g}" if b < 1e4 else f"{b:,.0f}", f"{b / a:.2f}"]
        for what, a, b in found
    ]


def main() -> None:
    import tempfile

    parser = options(__doc__, "scaling.py")
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(given.threads or 1)
    with tempfile.TemporaryDirectory() as folder:
        checked = checks(1 if given.quick else given.repeats, Path(folder))
    progress("checked")
    distil, twist, calibration = [], [], []
    for label, config in sizes().items():
        more = rows(config, label)
        distil += more[0]
        twist += more[1]
        calibration.append(more[2])
    per_step = ["GB in a GPU", "GB that a GPU sends", "s of work", "s of network"]
    text = table("Distillation, a step of 524,288 tokens", ["model", *per_step, "h for a billion tokens"], distil)
    head = [
        "model",
        "slice",
        "GB in a GPU",
        "GB that a worker sends in a round",
        *per_step[2:],
        "h for a billion tokens",
    ]
    text += "\n" + table("TwIST, half of the heads, a step of as many tokens, 15 in a round", head, twist)
    head = ["model", "parameters, billion", "billion operations a token", "GB of weights, bf16"]
    head += [f"s on {gpus} GPUs" for gpus in (1, *GPUS[:2])]
    text += "\n" + table("Calibration with 128 sequences of 2048 tokens", head, calibration)
    text += "\n" + table("The formulas on this machine", ["what", "predicted", "measured", "ratio"], checked)
    deliver(given, "scaling.py", text + "\n\n" + provenance(f"medians of {given.repeats}, in turns; seed 0"), {})


if __name__ == "__main__":
    main()
