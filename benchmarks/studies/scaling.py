"""Compute training beyond one machine: bytes, memory, time of 1.3B to 70B on 8 to 512 GPUs; and check the formulas.

Operations and parameters are counted on the meta device, of the model and of its slice; rates are assumptions that the
page states. The checks run the reference model: the same formulas, against the clock, in turns, on this machine.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from common import NO, Made, forward, in_turns, random_tokens, table

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
    """Return label -> config."""
    found = {"1.3B": shape_config("mamba2-1.3b"), "2.7B": shape_config("mamba2-2.7b")}
    for label, (width, layers, groups) in WIDE.items():
        config = found[label] = copy.deepcopy(found["2.7B"])
        config.hidden_size, config.num_hidden_layers, config.n_groups = width, layers, groups
        config.num_heads, config.vocab_size = 2 * width // 64, 32768
    return found


def counted(model: Any) -> tuple[int, int]:
    """Return parameters, and operations of a forward for one token."""
    return sum(p.numel() for p in model.parameters()), token_operations(model, footprint(model, sspruner.trace(model)))


def sliced(model: Any, ends: int = ENDS, keep: float = KEEP) -> Any:
    """Return a worker's model."""
    deal, made = Deal(model, ["head"], keep, ends, 0), copy.deepcopy(model)
    slice_model(made, deal.draw("size", 1)[0], deal.graph)
    return made


def costs(label: str, gpus: int, held: float, compute: float, sent: float, every: int) -> list[str]:
    """Return GB in a GPU, GB sent, seconds of work and of network a step, and hours for TOKENS if it fits."""
    network = sent / (INSIDE if gpus <= NODE else BETWEEN) / every
    memory = f"{held / 1e9:,.0f}{'' if held < MEMORY else ' (too much)'}"
    hours = f"{TOKENS / BATCH * (compute + network) / 3600:,.2f}" if held < MEMORY else NO
    return [label, memory, f"{sent / 1e9:,.1f}", f"{compute:.2f}", f"{network:.2f}", hours]


def rows(config: Any, label: str) -> tuple[list[list[str]], list[list[str]], list[str]]:
    """Return recovery by distillation and TwIST on every number of GPUs; and calibration."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    (P, work), (S, part) = counted(model), counted(sliced(model))
    heads = min(g.units for g in sspruner.trace(model).on_axis("head").values())
    distil, twist = [], []
    for gpus in GPUS:
        share, steps = (gpus - 1) / gpus, BATCH / gpus / FLOPS
        # fp32 weights, gradients, two moments; buckets of gradients; bf16 copies; the teacher in bf16.
        held = (16 + 4 + 2.0 + 2) * P
        distil.append(costs(f"{label}, {gpus} GPUs", gpus, held, (3 + 1) * work * steps, 2 * 4 * P * share, 1))
        held = (16 + 2) * S + 12 * P / gpus
        row = costs(f"{label}, {gpus} workers", gpus, held, 3 * part * steps, 2 * 12 * S * share, EVERY)
        row[-1] = f"refused: {gpus} > {heads} heads" if gpus > heads else row[-1]
        twist.append([row[0], f"{S / P:.2f}", *row[1:]])
    seconds = [2 * work * OBSERVED[0] * OBSERVED[1] / gpus / FLOPS for gpus in (1, *GPUS[:2])]
    calibration = [label, f"{P / 1e9:.2f}", f"{work / 1e9:.2f}", f"{2 * P / 1e9:,.0f}", *(f"{s:,.1f}" for s in seconds)]
    return distil, twist, calibration


def step(model: Any, tokens: torch.Tensor, objective: Callable[..., Any]) -> None:
    """Take a training step of the package, without the optimiser."""
    model.zero_grad()
    torch.autograd.backward(objective(model, tokens)[0])


def checks(repeats: int) -> list[list[str]]:
    """Return the formulas on the reference model: predicted, measured, and their ratio."""
    model, tokens = sspruner.load("mamba2-books-4m", dtype="float32")[0], random_tokens(4, 256)
    still, student, teacher = (copy.deepcopy(model) for _ in range(3))
    jobs: dict[str, Callable[[], Any]] = {"dense": partial(step, model, tokens, likelihood)}
    jobs["forward"] = partial(forward, still, tokens)
    jobs["distil"] = partial(step, student, tokens, distillation(teacher))
    cut, work = {f"{keep:g}": sliced(model, 1, keep) for keep in (0.75, 0.5, 0.25)}, counted(model)[1]
    jobs |= {keep: partial(step, small, tokens, likelihood) for keep, small in cut.items()}
    took = {name: median(seconds) for name, seconds in in_turns(jobs, repeats).items()}
    found = [("a step / a forward", 3.0, took["dense"] / took["forward"])]
    found += [("a step of distillation / a plain one", 4 / 3, took["distil"] / took["dense"])]
    for keep, small in cut.items():
        what = f"a step of a slice of {keep} of the heads / a dense one"
        found.append((what, counted(small)[1] / work, took[keep] / took["dense"]))
    return [[what, *(f"{x:,.3g}" if x < 1e4 else f"{x:,.0f}" for x in (a, b)), f"{b / a:.2f}"] for what, a, b in found]


def tables(s: Any) -> Made:
    """Return distillation, TwIST, calibration, and the checks. Settings: repeats."""
    checked, found = checks(s.repeats), [rows(config, label) for label, config in sizes().items()]
    distil, twist = ([row for part in found for row in part[i]] for i in (0, 1))
    costs = ["s of work", "s of network", "h for a billion tokens"]
    a, b = ["GB in a GPU", "GB that a GPU sends"], ["slice", "GB in a GPU", "GB that a worker sends in a round"]
    c = ["parameters, billion", "billion operations a token", "GB of weights, bf16"]
    c += [f"s on {gpus} GPUs" for gpus in (1, *GPUS[:2])]
    return [
        table("Distillation, a step of 524,288 tokens", ["model", *a, *costs], distil),
        table("TwIST, half of the heads, a step of as many tokens, 15 in a round", ["model", *b, *costs], twist),
        table("Calibration with 128 sequences of 2048 tokens", ["model", *c], [part[2] for part in found]),
        table("The formulas on this machine", ["what", "predicted", "measured", "ratio"], checked),
    ], f"medians of {s.repeats}, in turns; seed 0"
