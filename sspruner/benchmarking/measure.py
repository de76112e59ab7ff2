"""`bench`: prefill and decode of several models, interleaved in one run, beside the machine's ceiling."""

from __future__ import annotations

import platform
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from sspruner.benchmarking.ceiling import Machine, Rates, head_weights, prefill_work, step_work, token_operations
from sspruner.benchmarking.footprint import BATCHES, footprint
from sspruner.benchmarking.record import DECODE, PREFILL, Bench, Timing, timing
from sspruner.benchmarking.run import Times, path_of, run_once
from sspruner.compute import acceleration
from sspruner.compute.device import on_device, resolve_device
from sspruner.errors import InputError
from sspruner.graph.trace import trace

WARM_UP = 8  # tokens of the prompt that is run before anything is timed, on the CPU
FASTER = ", accelerated"


def bench(
    models: Mapping[str, Any],
    *,
    batches: Sequence[int] = BATCHES,
    prompt: int = 512,
    generate: int = 64,
    repeats: int = 7,
    accelerate: bool = False,
    device: str | None = None,
    bandwidth: float | None = None,
    flops: float | None = None,
    cuda_graph: bool = False,
    profile: bool = False,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Bench:
    """Time prefill and decode of every model at every batch, in turns; within a repeat the order is drawn anew.

    models: by the name that rows have. prompt, generate: tokens of a sequence, random ids. accelerate: measure each
    model a second time with `sspruner.accelerate`, on the CPU. bandwidth (bytes/s) and flops (operations/s): the
    machine's; where not given, the best of what copies, sums and matrix products reach between the measurements.
    cuda_graph: replay the decode step. profile: also where the time of a decode step goes, at the largest batch.
    Raises InputError for numbers out of range; a batch that does not fit into memory is left out, and named.
    """
    _check(models, batches, cuda_graph, prompt=prompt, generate=generate, repeats=repeats)
    where = resolve_device(device)
    if cuda_graph and where.type != "cuda":
        raise InputError(f"cuda_graph: there is none on {where}")
    progress = progress or (lambda _phase, _done, _total: None)
    variants = _variants(models, accelerate and where.type == "cpu")
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(on_device(model, where))
        machine = Machine(where, {next(model.parameters()).dtype for model in models.values()})
        jobs = [(label, batch) for batch in batches for label in variants]
        sizes = (prompt, generate, repeats, seed)
        times, peaks, failed = _timed(variants, jobs, where, sizes, cuda_graph, machine, progress)
        rates = {
            label: Rates(bandwidth or machine.bandwidth, flops or machine.flops(next(model.parameters()).dtype))
            for label, (model, _) in variants.items()
        }
        rows = [
            row
            for label, (model, faster) in variants.items()
            for row in _rows(label, model, faster, times, peaks, rates[label], where, prompt, generate, cuda_graph)
        ]
        shown = {}
        if profile:
            from sspruner.benchmarking.profile import profiled

            for i, (label, (model, faster)) in enumerate(variants.items()):
                progress("profile", i, len(variants))
                fitting = [batch for name, batch in times if name == label]
                if fitting:
                    with _as(model, faster):
                        shown[label] = profiled(model, _ids(model, max(fitting), prompt, seed, where))
    rows.sort(key=lambda row: (row.phase != DECODE, batches.index(row.batch)))
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else _processor()
    found = {
        "device": str(where),
        "name": name,
        "threads": torch.get_num_threads(),
        "bandwidth": bandwidth or machine.bandwidth,
        "flops": max(rate.flops for rate in rates.values()),
        "measured": [what for what, given in (("bandwidth", bandwidth), ("flops", flops)) if not given],
    }
    return Bench(tuple(rows), found, prompt, generate, repeats, seed, tuple(failed), shown)


def order(jobs: Sequence[Any], repeats: int, seed: int) -> Iterator[list[Any]]:
    """Every job once in each repeat, in an order of its own."""
    rng = random.Random(seed)
    for _ in range(repeats):
        yield rng.sample(list(jobs), len(jobs))


def _timed(
    variants: dict[str, tuple[Any, bool]],
    jobs: list[tuple[str, int]],
    device: torch.device,
    sizes: tuple[int, int, int, int],
    cuda_graph: bool,
    machine: Machine,
    progress: Callable[[str, int, int], None],
) -> tuple[dict[tuple[str, int], list[Times]], dict[tuple[str, int], list[Times]], list[dict[str, Any]]]:
    """By (label, batch): all repeats, and runs of which the peaks count; and what did not fit.

    On the CPU peaks have a turn of their own, for it is none to be timed.
    """
    prompt, generate, repeats, seed = sizes
    on_cpu = device.type == "cpu"
    times: dict[tuple[str, int], list[Times]] = {job: [] for job in jobs}
    peaks: dict[tuple[str, int], list[Times]] = {job: [] for job in jobs} if on_cpu else times
    untimed = ["warm-up", *["peak memory"] * on_cpu]
    turns = [*([*jobs] for _ in untimed), *order(jobs, repeats, seed)]
    failed, done, total = [], 0, len(turns) * len(jobs)
    for i, turn in enumerate(turns):
        machine.sample()
        phase = untimed[i] if i < len(untimed) else ""
        for label, batch in turn:
            progress(phase or f"{label}, batch {batch}", done, total)
            done += 1
            if (label, batch) not in times:
                continue
            model, faster = variants[label]
            length = min(prompt, WARM_UP) if phase == "warm-up" and on_cpu else prompt
            steps, memory = 1 if phase else generate, phase == "peak memory"
            try:
                with _as(model, faster):
                    ids = _ids(model, batch, length, seed, device)
                    found = run_once(model, ids, steps, cuda_graph=cuda_graph, memory=memory)
            except (
                RuntimeError
            ) as error:  # torch.OutOfMemoryError is one; the CPU's allocator raises no type of its own
                if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                    raise
                del times[label, batch]
                failed.append({"model": label, "batch": batch, "error": "does not fit into memory"})
                continue
            if phase != "warm-up":
                (peaks if memory else times)[label, batch].append(found)
    return times, peaks, failed


def _rows(
    label: str,
    model: Any,
    faster: bool,
    times: dict[tuple[str, int], list[Times]],
    peaks: dict[tuple[str, int], list[Times]],
    rates: Rates,
    device: torch.device,
    prompt: int,
    generate: int,
    cuda_graph: bool,
) -> Iterator[Timing]:
    """The rows of one model, both phases of every batch that fits."""
    found = footprint(model, trace(model), prompt + generate // 2)
    operations, head = token_operations(model, found), head_weights(model)
    for (name, batch), runs in times.items():
        if name != label:
            continue
        step, whole = step_work(found, operations, batch), prefill_work(found, operations, head, batch, prompt)
        watched = peaks[name, batch]
        at_step, at_prefill = [run.step_peak for run in watched], [run.prefill_peak for run in watched]
        phases = (
            (DECODE, tuple(run.step for run in runs), batch, step, at_step, cuda_graph, faster),
            (PREFILL, tuple(run.prefill for run in runs), batch * prompt, whole, at_prefill, False, False),
        )
        for phase, seconds, tokens, work, peak, replayed, quick in phases:
            highest = max((p for p in peak if p is not None), default=None)
            path = path_of(model, device, quick, replayed)
            yield timing(
                seconds, tokens, work, rates, model=label, batch=batch, phase=phase, peak_bytes=highest,
                state_bytes=found.state_bytes, weight_bytes=found.weight_bytes, path=path,
            )  # fmt: skip


def _variants(models: Mapping[str, Any], faster: bool) -> dict[str, tuple[Any, bool]]:
    """label -> model, and whether it is measured with the faster step; one that has it already keeps it."""
    found: dict[str, tuple[Any, bool]] = {}
    for label, model in models.items():
        found[label] = model, acceleration.accelerated(model)
        if faster and not acceleration.accelerated(model):
            found[label + FASTER] = model, True
    return found


@contextmanager
def _as(model: Any, faster: bool) -> Iterator[None]:
    """The model with the faster step inside the block, if that is asked for, and as it was after it."""
    if not faster or acceleration.accelerated(model):
        with nullcontext():
            yield
        return
    acceleration.accelerate(model)
    try:
        yield
    finally:
        acceleration.decelerate(model)


def _ids(model: Any, batch: int, length: int, seed: int, device: torch.device) -> torch.Tensor:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed)).to(device)


def _check(models: Mapping[str, Any], batches: Sequence[int], cuda_graph: bool, **least_one: int) -> None:
    if not models:
        raise InputError("bench: there is no model to measure")
    if not batches or min(batches) < 1:
        raise InputError(f"batches {list(batches)}: at least one, each at least 1")
    for name, value in least_one.items():
        if value < 1:
            raise InputError(f"{name} {value}: must be at least 1")


def _processor() -> str:
    """The name of the processor, as well as the system knows it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
