"""`sspruner bench`: how fast models are, beside what the machine could do."""

from __future__ import annotations

from typing import Annotated

import typer

from sspruner.cli import options as o
from sspruner.cli.console import (
    batches_from,
    check_json,
    command_line,
    emit,
    numbers_from,
    prepare,
    progress_bar,
    reports_errors,
    show,
)

NAME = "bench"


@reports_errors
def command(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...", help="Model folders or hub ids. Default: the reference model.", show_default=False
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="A published shape with random weights: mamba2-130m, 370m, 780m, 1.3b, 2.7b. Repeatable."),
    ] = None,
    keep: Annotated[str | None, typer.Option(help="With --shape: also with these states, e.g. 64,32,16.")] = None,
    balanced: Annotated[
        str | None, typer.Option(help="With --shape: also with so many directions of the state, e.g. 16.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Sequences that are decoded at once.")] = "1,16,64,256",
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 512,
    generate: Annotated[int, typer.Option(help="Decode steps.")] = 64,
    repeats: Annotated[int, typer.Option(help="Times that everything is measured, in turns.")] = 7,
    accelerate: Annotated[
        bool, typer.Option("--accelerate", help="Measure each model with sspruner.accelerate, too (on the CPU).")
    ] = False,
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph", help="Replay the decode step as a CUDA graph.")] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Show where the time of a decode step goes, by operation.")
    ] = False,
    bandwidth: Annotated[
        str | None, typer.Option(help="The machine's, for the ceiling, e.g. 3.35TB/s.", show_default="measured")
    ] = None,
    flops: Annotated[
        str | None, typer.Option(help="The machine's, for the ceiling, e.g. 989TFLOP/s.", show_default="measured")
    ] = None,
    device: o.Device = None,
    dtype: Annotated[
        str,
        typer.Option(help="auto (as saved; of shapes bfloat16 on a GPU, else float32), float32, bfloat16 or float16."),
    ] = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    seed: o.Seed = 0,
    plugin: o.Plugin = None,
    json: o.Json = None,
) -> None:
    """Measure prefill and decode of models, in turns, beside the most that this machine's rates allow."""
    from dataclasses import replace

    import sspruner
    from sspruner.io.named import named_models
    from sspruner.reporting.bench import bench_table
    from sspruner.units import parse_bandwidth, parse_flops

    check_json(json)
    batches = batches_from(batch)
    states = numbers_from(keep, "--keep"), numbers_from(balanced, "--balanced")
    rates = (
        None if bandwidth is None else parse_bandwidth(bandwidth, "--bandwidth"),
        None if flops is None else parse_flops(flops, "--flops"),
    )
    prepare(plugin)
    found = named_models(
        models or [],
        shape or [],
        *states,
        dtype=dtype,
        device=device,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    with progress_bar() as progress:
        measured = sspruner.bench(
            found,
            batches=batches,
            prompt=prompt,
            generate=generate,
            repeats=repeats,
            accelerate=accelerate,
            device=device,
            bandwidth=rates[0],
            flops=rates[1],
            cuda_graph=cuda_graph,
            profile=profile,
            seed=seed,
            progress=progress,
        )
    measured = replace(measured, command=command_line())
    emit(measured.to_json(), json)
    if str(json) != "-":
        show(bench_table(measured))
