"""Bench in an engine: decode steps of several exported models, in turns, in the engine's own process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sspruner.benchmarking.cache_layers import cache_layers
from sspruner.benchmarking.ceiling import Machine, Rates, step_work, token_operations
from sspruner.benchmarking.engine_process import EngineProcess, note_on_version
from sspruner.benchmarking.footprint import footprint
from sspruner.benchmarking.llama_cache import LlamaCache
from sspruner.benchmarking.measure import machine_facts, order, rates_of
from sspruner.benchmarking.record import DECODE, Bench, Timing, timing
from sspruner.benchmarking.vllm_cache import VllmCache
from sspruner.errors import InputError
from sspruner.graph.trace import trace
from sspruner.recipes.measure import BenchOptions, Load
from sspruner.recipes.serving import EngineOptions

CPU_BLOCK = 128  # tokens: vLLM's --block-size on a CPU
CELLS = 256  # llama.cpp gives every sequence a multiple of so many tokens
SPARE = 4  # sequences more than the largest batch that vLLM's pool has room for
Progress = Callable[[str, int, int], None]


def bench_in_engine(
    models: Mapping[str, Any],
    paths: Mapping[str, Path],
    options: BenchOptions,
    device: str | None,
    progress: Progress,
) -> Bench:
    """Time decode steps of every model at every batch, in turns, in an engine.

    models: label -> model, whose sizes give the ceiling. paths: label -> its folder or file for the engine.
    device: what the engine must run on; None for any.

    Raises InputError if the engine does not load the models, or ends.
    """
    load, runner = options.load, options.runner
    length = load.prompt + load.generate
    batch, tokens = max(load.batches), 2 * (length + max(load.batches))
    request = {
        "models": [
            {
                "path": str(paths[label]),
                "dtype": _dtype(model),
                "cache_bytes": (batch + SPARE) * bytes_per_sequence(model, runner.engine, tokens, "cpu", "float32"),
            }
            for label, model in models.items()
        ],
        "batch": batch,
        "length": tokens // 2,
        "threads": torch.get_num_threads(),
        "eager": not options.variants.cuda_graph,
    }
    with EngineProcess(runner.engine, runner.python, runner.wait) as process:
        progress("loading", 0, 1)
        ready = process.ask(**request)
        if "error" in ready:
            raise InputError(f"engine {runner.engine}: {ready['error']}")
        where = _place(str(ready["device"]), device, options)
        machine = _machine(where, models, options)
        times, failed = _timed(process, models, options, machine, progress)
    rates = rates_of(models, options.ceiling, machine)
    path = f"{runner.engine} {ready['version']}" + (", CUDA graph" if options.variants.cuda_graph else "")
    rows: list[Timing] = []
    for (label, model), dtype in zip(models.items(), ready["state_dtypes"], strict=True):
        cache = bytes_per_sequence(model, runner.engine, length, where.type, dtype)
        rows += _rows(label, model, times, rates[label], load, cache_bytes=cache, path=path)
    rows.sort(key=lambda row: load.batches.index(row.batch))
    notes = [note for note in [note_on_version(runner.engine, ready["version"])] if note]
    return Bench(
        tuple(rows),
        machine_facts(where, options.ceiling, rates),
        load.prompt,
        load.generate,
        load.repeats,
        load.seed,
        tuple(failed),
        engine={"name": runner.engine, "version": ready["version"], "notes": notes},
    )


def bytes_per_sequence(model: Any, engine: str, tokens: int, device: str, state_dtype: str | None) -> int:
    """Return the bytes of cache that a sequence of so many tokens takes, as the engine counts them.

    state_dtype: of the recurrent state; None for the engine's default.
    """
    layers, options = cache_layers(model, trace(model)), EngineOptions(state_dtype=state_dtype)
    if engine == "llama.cpp":
        return LlamaCache(layers, options).bytes_per_sequence(CELLS * -(-tokens // CELLS))
    cache = VllmCache(layers, options)
    return (replace(cache, block_size=CPU_BLOCK) if device == "cpu" else cache).bytes_per_sequence(tokens)


def _dtype(model: Any) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _place(runs_on: str, asked: str | None, options: BenchOptions) -> torch.device:
    """Return the device that the engine runs on. Raises InputError for another one than was asked for."""
    engine = options.runner.engine
    if asked is not None and torch.device(asked).type != runs_on:
        raise InputError(f"device {asked}: {engine} runs on {runs_on} in this environment")
    rated = options.ceiling.bandwidth and options.ceiling.flops
    if runs_on != "cpu" and not torch.cuda.is_available() and not rated:
        raise InputError(f"{engine} runs on {runs_on}, which torch does not see here: give --bandwidth and --flops")
    if options.variants.cuda_graph and runs_on != "cuda":
        raise InputError(f"cuda_graph: there is none on {runs_on}")
    return torch.device(runs_on)


def _machine(where: torch.device, models: Mapping[str, Any], options: BenchOptions) -> Machine | None:
    """Return what measures the rates; None if both are given."""
    if options.ceiling.bandwidth and options.ceiling.flops:
        return None
    return Machine(where, {next(model.parameters()).dtype for model in models.values()})


Job = tuple[str, int]  # label and batch


def _timed(
    process: EngineProcess,
    models: Mapping[str, Any],
    options: BenchOptions,
    machine: Machine | None,
    progress: Progress,
) -> tuple[dict[Job, list[float]], list[dict[str, Any]]]:
    """Measure every model at every batch in turns, after one that is not counted. What fails is left out.

    Raises InputError if everything fails.
    """
    load, labels = options.load, list(models)
    jobs = [(label, batch) for batch in load.batches for label in labels]
    times: dict[Job, list[float]] = {job: [] for job in jobs}
    failed: list[dict[str, Any]] = []
    done, total = 0, (1 + load.repeats) * len(jobs)
    for number, turn in enumerate([jobs, *order(jobs, load.repeats, load.seed)]):
        if machine is not None:
            machine.sample()
        for label, batch in turn:
            progress("warm-up" if number == 0 else f"{label}, batch {batch}", done, total)
            done += 1
            if (label, batch) not in times:
                continue
            answer = process.ask(
                model=labels.index(label),
                batch=batch,
                prompt=load.prompt,
                generate=load.generate if number else 1,
                seed=load.seed,
                vocabulary=models[label].get_input_embeddings().weight.shape[0],
            )
            if "error" in answer:
                del times[label, batch]
                failed.append({"model": label, "batch": batch, "error": answer["error"]})
            elif number:
                times[label, batch].append(float(answer["seconds"]))
    if not times:
        raise InputError(f"engine {options.runner.engine}: {failed[0]['error']}")
    return times, failed


def _rows(
    label: str, model: Any, times: Mapping[Job, list[float]], rates: Rates, load: Load, **what: Any
) -> Iterator[Timing]:
    """Yield the rows of one model, one for each batch. what: cache_bytes and path of all of them."""
    memory = footprint(model, trace(model), load.prompt + load.generate // 2)
    operations = token_operations(model, memory)
    what |= {"state_bytes": memory.state_bytes, "weight_bytes": memory.weight_bytes, "peak_bytes": None}
    for (name, batch), seconds in times.items():
        if name == label:
            work = step_work(memory, operations, batch)
            yield timing(seconds, batch, work, rates, model=label, batch=batch, phase=DECODE, **what)
