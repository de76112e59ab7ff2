"""`bench`: prefill and decode of several models, interleaved in one run, beside the machine's ceiling."""

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
from sspruner.recipes.common import recipe_or_short
from sspruner.recipes.measure import BenchOptions, Ceiling, Load

WARM_UP = 8  # tokens of the prompt that is run before anything is timed, on the CPU
FASTER = ", accelerated"


def bench(
    models: Mapping[str, Any],
    options: BenchOptions | None = None,
    *,
    device: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    **short: Any,
) -> Bench:
    """Time prefill and decode of every model at every batch, in turns; within a repeat the order is drawn anew.

    Args:
        models: by the name that rows have.
        options: `BenchOptions`; or its fields as `short` arguments: `bench(models, batches=(1, 16), prompt=128)`.
            Prompts are random ids. bandwidth (bytes/s) and flops (operations/s) are the machine's; where not given,
            the best of what copies, sums and matrix products reach between the measurements. `profile` shows a decode
            step at the largest batch.
        device: the compute device; CUDA if there is one, else the CPU.
        progress: called with (phase, done, total).

    Raises:
        InputError: for numbers out of range. A batch that does not fit into memory is left out, and named.
    """
    options = recipe_or_short(BenchOptions, options, short)
    load, how = options.load, options.variants
    if not models:
        raise InputError("bench: there is no model to measure")
    where = resolve_device(device)
    if how.cuda_graph and where.type != "cuda":
        raise InputError(f"cuda_graph: there is none on {where}")
    progress = progress or (lambda _phase, _done, _total: None)
    variants = _variants(models, how.accelerate and where.type == "cpu")
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(on_device(model, where))
        machine = Machine(where, {next(model.parameters()).dtype for model in models.values()})
        runs = _timed(variants, options, machine, progress)
        rates = _rates(variants, options.ceiling, machine)
        rows = [row for label in variants for row in _rows(label, variants[label], runs, rates[label], options, where)]
        shown = _profiles(variants, runs, load, where, progress) if how.profile else {}
    rows.sort(key=lambda row: (row.phase != DECODE, load.batches.index(row.batch)))
    found = _machine(where, machine, options.ceiling, rates)
    return Bench(tuple(rows), found, load.prompt, load.generate, load.repeats, load.seed, tuple(runs.failed), shown)


Variant = tuple[Any, bool]  # a model, and whether it is measured with the faster step
Job = tuple[str, int]  # label and batch


@dataclass(frozen=True)
class Runs:
    """What was timed, by label and batch: all repeats, and the runs of which the peaks count; and what did not fit."""

    times: dict[Job, list[Times]]
    peaks: dict[Job, list[Times]]
    failed: list[dict[str, Any]]


def _rates(variants: dict[str, Variant], given: Ceiling, machine: Machine) -> dict[str, Rates]:
    """Return the rates for each variant: those that are given, else what the machine reached."""
    return {
        label: Rates(given.bandwidth or machine.bandwidth, given.flops or machine.flops(next(model.parameters()).dtype))
        for label, (model, _) in variants.items()
    }


def _machine(where: torch.device, machine: Machine, given: Ceiling, rates: dict[str, Rates]) -> dict[str, Any]:
    """Return the machine as the result describes it."""
    return {
        "device": str(where),
        "name": torch.cuda.get_device_name(where) if where.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "bandwidth": given.bandwidth or machine.bandwidth,
        "flops": max(rate.flops for rate in rates.values()),
        "measured": [name for name in ("bandwidth", "flops") if not getattr(given, name)],
    }


def _profiles(
    variants: dict[str, Variant], runs: Runs, load: Load, where: torch.device, progress: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Return where the time of a decode step goes, by label, at the largest batch that fits."""
    from sspruner.benchmarking.profile import profiled

    shown = {}
    for i, (label, (model, faster)) in enumerate(variants.items()):
        progress("profile", i, len(variants))
        fitting = [batch for name, batch in runs.times if name == label]
        if fitting:
            with _as(model, faster):
                shown[label] = profiled(model, _ids(model, max(fitting), load.prompt, load.seed, where))
    return shown


def order(jobs: Sequence[Any], repeats: int, seed: int) -> Iterator[list[Any]]:
    """Every job once in each repeat, in an order of its own."""
    rng = random.Random(seed)
    for _ in range(repeats):
        yield rng.sample(list(jobs), len(jobs))


def _timed(
    variants: dict[str, Variant],
    options: BenchOptions,
    machine: Machine,
    progress: Callable[[str, int, int], None],
) -> Runs:
    """Run every variant at every batch in turns. On the CPU peaks have a turn of their own, which is not timed."""
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
    return Runs(times, peaks, failed)


def _rows(
    label: str, variant: Variant, runs: Runs, rates: Rates, options: BenchOptions, device: torch.device
) -> Iterator[Timing]:
    """The rows of one model, both phases of every batch that fits."""
    (model, faster), prompt, cuda_graph = variant, options.load.prompt, options.variants.cuda_graph
    found = footprint(model, trace(model), prompt + options.load.generate // 2)
    operations, head = token_operations(model, found), head_weights(model)
    for (name, batch), timed in runs.times.items():
        if name != label:
            continue
        step, whole = step_work(found, operations, batch), prefill_work(found, operations, head, batch, prompt)
        watched = runs.peaks[name, batch]
        at_step, at_prefill = [run.step_peak for run in watched], [run.prefill_peak for run in watched]
        phases = (
            (DECODE, tuple(run.step for run in timed), batch, step, at_step, cuda_graph, faster),
            (PREFILL, tuple(run.prefill for run in timed), batch * prompt, whole, at_prefill, False, False),
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


def _processor() -> str:
    """The name of the processor, as well as the system knows it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
