"""Bench in transformers: prefill and decode of several models, in turns in one run, beside the machine's ceiling."""

from __future__ import annotations

import platform
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sspruner.benchmarking.ceiling import Machine, Rates, head_weights, prefill_work, step_work, token_operations
from sspruner.benchmarking.footprint import footprint
from sspruner.benchmarking.record import DECODE, PREFILL, Bench, Timing, timing
from sspruner.benchmarking.run import Times, path_of, run_once
from sspruner.compute import acceleration
from sspruner.compute.device import on_device, resolve_device
from sspruner.errors import InputError
from sspruner.graph.trace import trace
from sspruner.recipes.measure import BenchOptions, Ceiling, Load

WARM_UP = 8  # prompt tokens of the untimed first run on the CPU
FASTER = ", accelerated"


def bench_in_transformers(
    models: Mapping[str, Any],
    options: BenchOptions,
    device: str | None,
    progress: Callable[[str, int, int], None],
) -> Bench:
    """Time prefill and decode of every model at every batch, in turns; the order is drawn anew in each repeat.

    The arguments are those of `sspruner.bench`. Raises InputError for options that the device does not have. A batch
    that does not fit into memory is left out, and recorded.
    """
    load, how = options.load, options.variants
    where = resolve_device(device)
    if how.cuda_graph and where.type != "cuda":
        raise InputError(f"cuda_graph: there is none on {where}")
    variants = _variants(models, how.accelerate and where.type == "cpu")
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(on_device(model, where))
        machine = Machine(where, {next(model.parameters()).dtype for model in models.values()})
        runs = _timed(variants, options, machine, progress)
        rates = rates_of({label: model for label, (model, _) in variants.items()}, options.ceiling, machine)
        rows = [row for label in variants for row in _rows(label, variants[label], runs, rates[label], options, where)]
        shown = _profiles(variants, runs, load, where, progress) if how.profile else {}
    rows.sort(key=lambda row: (row.phase != DECODE, load.batches.index(row.batch)))
    description = machine_facts(where, options.ceiling, rates)
    return Bench(
        tuple(rows), description, load.prompt, load.generate, load.repeats, load.seed, tuple(runs.failed), shown
    )


Variant = tuple[Any, bool]  # a model, and whether it is measured with `accelerate`
Job = tuple[str, int]  # label and batch


@dataclass(frozen=True)
class Runs:
    """All timings and peak memory by label and batch, and the batches that did not fit."""

    times: dict[Job, list[Times]]
    peaks: dict[Job, list[Times]]
    failed: list[dict[str, Any]]


def rates_of(models: Mapping[str, Any], ceiling: Ceiling, machine: Machine | None) -> dict[str, Rates]:
    """Return the rates for each model: the given ones, else those that the machine measured."""

    def rates(dtype: torch.dtype) -> Rates:
        if ceiling.bandwidth and ceiling.flops:
            return Rates(ceiling.bandwidth, ceiling.flops)
        assert machine is not None
        return Rates(ceiling.bandwidth or machine.bandwidth, ceiling.flops or machine.flops(dtype))

    return {label: rates(next(model.parameters()).dtype) for label, model in models.items()}


def machine_facts(where: torch.device, ceiling: Ceiling, rates: Mapping[str, Rates]) -> dict[str, Any]:
    """Return the description of the machine for the record."""
    name = _processor() if where.type == "cpu" else str(where)
    return {
        "device": str(where),
        "name": torch.cuda.get_device_name(where) if where.type == "cuda" and torch.cuda.is_available() else name,
        "threads": torch.get_num_threads(),
        "bandwidth": max(rate.bandwidth for rate in rates.values()),
        "flops": max(rate.flops for rate in rates.values()),
        "measured": [name for name in ("bandwidth", "flops") if not getattr(ceiling, name)],
    }


def _profiles(
    variants: dict[str, Variant], runs: Runs, load: Load, where: torch.device, progress: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Return the profile of a decode step by label, at the largest batch that fits."""
    from sspruner.benchmarking.profile import profiled

    profiles = {}
    for i, (label, (model, faster)) in enumerate(variants.items()):
        progress("profile", i, len(variants))
        fitting = [batch for name, batch in runs.times if name == label]
        if fitting:
            with _as(model, faster):
                profiles[label] = profiled(model, _ids(model, max(fitting), load.prompt, load.seed, where))
    return profiles


def order(jobs: Sequence[Any], repeats: int, seed: int) -> Iterator[list[Any]]:
    """Yield the jobs once for each repeat, each time in a random order."""
    rng = random.Random(seed)
    for _ in range(repeats):
        yield rng.sample(list(jobs), len(jobs))


def _timed(
    variants: dict[str, Variant],
    options: BenchOptions,
    machine: Machine,
    progress: Callable[[str, int, int], None],
) -> Runs:
    """Run every variant at every batch in turns. On the CPU, peak memory is measured in an untimed turn."""
    load, device, cuda_graph = options.load, machine.device, options.variants.cuda_graph
    prompt, generate, repeats, seed = load.prompt, load.generate, load.repeats, load.seed
    jobs = [(label, batch) for batch in load.batches for label in variants]
    on_cpu = device.type == "cpu"
    times: dict[tuple[str, int], list[Times]] = {job: [] for job in jobs}
    peaks: dict[tuple[str, int], list[Times]] = {job: [] for job in jobs} if on_cpu else times
    untimed = ["warm-up", *["peak memory"] * on_cpu]
    turns = [*([*jobs] for _ in untimed), *order(jobs, repeats, seed)]
    failed: list[dict[str, Any]] = []
    done, total = 0, len(turns) * len(jobs)
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
                    result = run_once(model, ids, steps, cuda_graph=cuda_graph, memory=memory)
            except RuntimeError as error:  # torch.OutOfMemoryError; the CPU's allocator raises a plain RuntimeError
                if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                    raise
                del times[label, batch]
                failed.append({"model": label, "batch": batch, "error": "does not fit into memory"})
                continue
            if phase != "warm-up":
                (peaks if memory else times)[label, batch].append(result)
    return Runs(times, peaks, failed)


def _rows(
    label: str, variant: Variant, runs: Runs, rates: Rates, options: BenchOptions, device: torch.device
) -> Iterator[Timing]:
    """Yield the rows of one model, both phases of every batch that fits."""
    (model, faster), prompt, cuda_graph = variant, options.load.prompt, options.variants.cuda_graph
    memory = footprint(model, trace(model), prompt + options.load.generate // 2)
    operations, head = token_operations(model, memory), head_weights(model)
    for (name, batch), timed in runs.times.items():
        if name != label:
            continue
        step, whole = step_work(memory, operations, batch), prefill_work(memory, operations, head, batch, prompt)
        watched = runs.peaks[name, batch]
        at_step, at_prefill = [run.step_peak for run in watched], [run.prefill_peak for run in watched]
        phases = (
            (DECODE, tuple(run.step for run in timed), batch, step, at_step, cuda_graph, faster),
            (PREFILL, tuple(run.prefill for run in timed), batch * prompt, whole, at_prefill, False, False),
        )
        for phase, seconds, tokens, work, peak, replayed, quick in phases:
            highest = max(
                (p for p in peak if p is not None and p > 0), default=None
            )  # a process that shrank tells nothing
            path = path_of(model, device, quick, replayed)
            yield timing(
                seconds, tokens, work, rates, model=label, batch=batch, phase=phase, peak_bytes=highest,
                state_bytes=memory.state_bytes, weight_bytes=memory.weight_bytes, path=path,
            )  # fmt: skip


def _variants(models: Mapping[str, Any], faster: bool) -> dict[str, tuple[Any, bool]]:
    """Return label -> (model, whether to accelerate); a model that is already accelerated stays so."""
    variants: dict[str, tuple[Any, bool]] = {}
    for label, model in models.items():
        variants[label] = model, acceleration.accelerated(model)
        if faster and not acceleration.accelerated(model):
            variants[label + FASTER] = model, True
    return variants


@contextmanager
def _as(model: Any, faster: bool) -> Iterator[None]:
    """Context manager that accelerates the model inside, if requested, and undoes it after."""
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


def _processor() -> str:
    """Return the name of the processor, as far as the system has it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
