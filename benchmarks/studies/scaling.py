"""Training beyond one machine, on paper: bytes, memory, time of 1.3B to 70B on 8 to 512 GPUs; the formulas checked.

Operations and parameters are counted on the meta device, of the model and of its slice; rates are assumptions that the
page states. The checks run the reference model: the same formulas, against the clock, in turns, on this machine.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import Made, in_turns, progress, random_tokens, table

import sspruner
from sspruner.benchmarking.ceiling import token_operations
from sspruner.benchmarking.footprint import footprint
from sspruner.benchmarking.shapes import shape_config
from sspruner.surgery.slice import slice_model
from sspruner.training.distil import distillation
from sspruner.training.gradual import likelihood
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


def costs(label: str, gpus: int, held: float, compute: float, sent: float, every: int) -> list[str]:
    """Return GB in a GPU, GB sent, seconds of work and of network a step, and hours for TOKENS if it fits."""
    network = sent / (INSIDE if gpus <= NODE else BETWEEN) / every
    memory = f"{held / 1e9:,.0f}{'' if held < MEMORY else ' (too much)'}"
    hours = f"{TOKENS / BATCH * (compute + network) / 3600:,.2f}" if held < MEMORY else "–"
    return [label, memory, f"{sent / 1e9:,.1f}", f"{compute:.2f}", f"{network:.2f}", hours]


def rows(config: Any, label: str) -> tuple[list[list[str]], list[list[str]], list[str]]:
    """Return recovery by distillation and TwIST on every number of GPUs; and calibration."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    P, work = counted(model)
    S, part = counted(sliced(model))
    heads = min(g.units for g in sspruner.trace(model).on_axis("head").values())
    distil, twist = [], []
    for gpus in GPUS:
        share, steps = (gpus - 1) / gpus, BATCH / gpus / FLOPS
        # fp32 weights, gradients, two moments; buckets of gradients; bf16 copies; the teacher in bf16.
        held = (16 + 4 + 2 + 2) * P
        distil.append(costs(f"{label}, {gpus} GPUs", gpus, held, (3 + 1) * work * steps, 2 * 4 * P * share, 1))
        held = (16 + 2) * S + 12 * P / gpus
        row = costs(f"{label}, {gpus} workers", gpus, held, 3 * part * steps, 2 * 12 * S * share, EVERY)
        row[-1] = f"refused: {gpus} > {heads} heads" if gpus > heads else row[-1]
        twist.append([row[0], f"{S / P:.2f}", *row[1:]])
    seconds = [2 * work * OBSERVED[0] * OBSERVED[1] / gpus / FLOPS for gpus in (1, *GPUS[:2])]
    calibration = [label, f"{P / 1e9:.2f}", f"{work / 1e9:.2f}", f"{2 * P / 1e9:,.0f}", *(f"{s:,.1f}" for s in seconds)]
    return distil, twist, calibration


def step_of(model: Any, tokens: torch.Tensor, teacher: Any = None) -> Callable[[], Any]:
    """Return a training step of the package, without the optimiser."""
    objective = likelihood if teacher is None else distillation(teacher)

    def step() -> None:
        model.zero_grad()
        torch.autograd.backward(objective(model, tokens)[0])

    return step


def exchanged(workers: int, repeats: int) -> dict[str, float]:
    """Return bytes that a process sends in a round, seconds of it, and the rate of a plain all-to-all."""
    worker, settings = Path(__file__).with_name("scaling_worker.py"), map(str, (KEEP, 1, repeats))
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={workers}", str(worker), *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def checks(repeats: int) -> list[list[str]]:
    """Return the formulas on the reference model: predicted, measured, and their ratio."""
    model, tokens = sspruner.load("mamba2-books-4m", dtype="float32")[0], random_tokens(4, 256)
    cut = {keep: sliced(model, 1, keep) for keep in (0.75, 0.5, 0.25)}
    jobs = {"dense": step_of(model, tokens), "distil": step_of(copy.deepcopy(model), tokens, copy.deepcopy(model))}
    jobs |= {f"keep {keep}": step_of(small, tokens) for keep, small in cut.items()}
    still = copy.deepcopy(model)
    jobs["forward"] = torch.no_grad()(lambda: still(input_ids=tokens, use_cache=False))
    took = {name: median(seconds) for name, seconds in in_turns(jobs, repeats).items()}
    (S, _), work = counted(cut[0.5]), counted(model)[1]
    found = [("a step / a forward", 3.0, took["dense"] / took["forward"])]
    found += [("a step of distillation / a plain one", 4 / 3, took["distil"] / took["dense"])]
    for keep, small in cut.items():
        measured = took[f"keep {keep}"] / took["dense"]
        found.append((f"a step of a slice of {keep} of the heads / a dense one", counted(small)[1] / work, measured))
    for workers in (2, 4):
        seen, sent = exchanged(workers, repeats), 2 * 12 * S * (workers - 1) / workers
        found.append((f"bytes that a worker sends in a round, {workers} workers", sent, seen["sent"]))
        found.append((f"seconds of an exchange, {workers} workers", sent / seen["rate"], seen["seconds"]))
    shown = lambda x: f"{x:,.3g}" if x < 1e4 else f"{x:,.0f}"  # noqa: E731
    return [[what, shown(a), shown(b), f"{b / a:.2f}"] for what, a, b in found]


def tables(s: Any) -> Made:
    """Return distillation, TwIST, calibration, and the checks. Settings: repeats."""
    checked = checks(s.repeats)
    progress("checked")
    distil, twist, calibration = [], [], []
    for label, config in sizes().items():
        more = rows(config, label)
        distil, twist, calibration = distil + more[0], twist + more[1], [*calibration, more[2]]
    per_step = ["GB in a GPU", "GB that a GPU sends", "s of work", "s of network"]
    text = table("Distillation, a step of 524,288 tokens", ["model", *per_step, "h for a billion tokens"], distil)
    head = ["model", "slice", per_step[0], "GB that a worker sends in a round", *per_step[2:], "h for a billion tokens"]
    text += "\n" + table("TwIST, half of the heads, a step of as many tokens, 15 in a round", head, twist)
    head = ["model", "parameters, billion", "billion operations a token", "GB of weights, bf16"]
    head += [f"s on {gpus} GPUs" for gpus in (1, *GPUS[:2])]
    text += "\n" + table("Calibration with 128 sequences of 2048 tokens", head, calibration)
    text += "\n" + table("The formulas on this machine", ["what", "predicted", "measured", "ratio"], checked)
    return text, f"medians of {s.repeats}, in turns; seed 0", None
