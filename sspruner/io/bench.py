"""Bench: the speed of models in transformers, or exported to another engine and measured in its own environment."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sspruner.benchmarking.engine_bench import bench_in_engine
from sspruner.benchmarking.engine_process import check_engine
from sspruner.benchmarking.measure import bench_in_transformers
from sspruner.benchmarking.record import Bench
from sspruner.errors import InputError, ModelError
from sspruner.formats.gguf_options import FILE
from sspruner.io.export import export
from sspruner.recipes.common import recipe_or_short
from sspruner.recipes.measure import BenchOptions


def bench(
    models: Mapping[str, Any],
    options: BenchOptions | None = None,
    *,
    device: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    **short: Any,
) -> Bench:
    """Time every model at every batch, in turns; the order is drawn anew in each repeat.

    Args:
        models: label of the rows -> model.
        options: `BenchOptions`; or its fields as `short` arguments: `bench(models, batches=(1, 16), prompt=128)`.
            Prompts are random ids. bandwidth (bytes/s) and flops (operations/s) are the machine's; by default the best
            rates that copies, sums and matrix products reach between the measurements. `profile` shows a decode step
            at the largest batch. `engine` other than transformers: decode alone, in a process of the interpreter
            `python`, of models that are exported to a temporary folder.
        device: the compute device; CUDA if there is one, else the CPU. Other engines choose theirs.
        progress: called with (phase, done, total).

    Raises:
        InputError: for numbers out of range, an engine that is not there, ends, or does not answer in time. A batch
            that does not fit into memory is left out, and recorded.
        ModelError: for a model that cannot be exported to the engine.
    """
    options = recipe_or_short(BenchOptions, options, short)
    progress = progress or (lambda _phase, _done, _total: None)
    if not models:
        raise InputError("bench: there is no model to measure")
    runner = options.runner
    if runner.engine == "transformers":
        return bench_in_transformers(models, options, device, progress)
    check_engine(runner.engine, runner.python)
    with tempfile.TemporaryDirectory(prefix="sspruner-bench-") as home:
        paths = {}
        for number, (label, model) in enumerate(models.items()):
            progress("export", number, len(models))
            paths[label] = _exported(label, model, runner.engine, Path(home, str(number)))
        return bench_in_engine(models, paths, options, device, progress)


def _exported(label: str, model: Any, engine: str, folder: Path) -> Path:
    """Export a model to what the engine reads; sspruner's plugin of vLLM reads projected states."""
    projected = any(hasattr(module, "state_encode") for module in model.modules())
    to = "gguf" if engine == "llama.cpp" else "hf-remote" if projected else "hf"
    try:
        export(model, folder, to=to)
    except ModelError as error:
        raise ModelError(f"{label} does not run in {engine}: {error}") from error
    return folder / FILE if to == "gguf" else folder
