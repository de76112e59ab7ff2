"""`sspruner evaluate`: what a model can do, alone or against the dense one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from sspruner.cli import options as o
from sspruner.cli.console import (
    check_json,
    command_line,
    emit,
    names_from,
    prepare,
    progress_bar,
    reports_errors,
    show,
)
from sspruner.errors import InputError

NAME = "evaluate"


@reports_errors
def command(
    model: o.Model = None,
    against: Annotated[
        str | None, typer.Option(help="Folder or hub id of the dense model: all is measured of both, paired.")
    ] = None,
    text: Annotated[
        str, typer.Option(help="Text file, datasets name, or self: sampled from --against, or from the model.")
    ] = "self",
    tokens: Annotated[int, typer.Option(help="Tokens of the text that are measured: the first ones.")] = 8192,
    max_length: Annotated[int, typer.Option(help="Tokens of the longest window.")] = 512,
    stride: Annotated[
        int | None, typer.Option(help="Tokens from one window to the next.", show_default="half of --max-length")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Some of perplexity, position, length, recall, passkey, separated by commas; or none.",
            show_default="all",
        ),
    ] = None,
    lambada: Annotated[str | None, typer.Option(help="LAMBADA: a .jsonl with `text`, or a datasets name.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-eval, separated by commas.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with lm-eval tasks of your own.")] = None,
    limit: Annotated[
        int | None, typer.Option(help="Passages of LAMBADA, and items of each task.", show_default="all")
    ] = None,
    max_ppl_increase: Annotated[
        str | None, typer.Option(help="Exit code 1 if perplexity rises by more over --against, e.g. 2%.")
    ] = None,
    max_lambada_drop: Annotated[
        float | None,
        typer.Option(help="Exit code 1 if LAMBADA's accuracy drops by more percentage points, e.g. 1."),
    ] = None,
    device: o.Device = None,
    dtype: o.Dtype = "auto",
    tokenizer: o.Tokenizer = None,
    trust_remote_code: o.TrustRemoteCode = False,
    seed: o.Seed = 0,
    plugin: o.Plugin = None,
    json: o.Json = None,
) -> None:
    """Measure perplexity, recall and tasks, with intervals, alone or against the dense model; gates for CI."""
    import sspruner
    from sspruner.evaluation.evaluate import METRICS
    from sspruner.io.source import name_of
    from sspruner.reporting.evaluation import evaluation_table
    from sspruner.units import parse_increase

    check_json(json)
    chosen = None if metrics is None else [name for name in names_from([metrics]) if name != "none"]
    increase = None if max_ppl_increase is None else parse_increase(max_ppl_increase, "--max-ppl-increase")
    if increase is not None and (against is None or "perplexity" not in (METRICS if chosen is None else chosen)):
        raise InputError("--max-ppl-increase compares perplexity with the dense model's: give --against DENSE, and "
                         "perplexity among --metrics")  # fmt: skip
    if max_lambada_drop is not None and (against is None or lambada is None):
        raise InputError("--max-lambada-drop compares LAMBADA's accuracy with the dense model's: give --against DENSE "
                         "and --lambada")  # fmt: skip
    prepare(plugin)
    with progress_bar() as progress:
        loaded, own = sspruner.load(model, tokenizer=tokenizer, dtype=dtype, trust_remote_code=trust_remote_code)
        dense = None
        if against is not None:
            dense, theirs = sspruner.load(against, dtype=dtype, trust_remote_code=trust_remote_code)
            own = own or theirs
        found = sspruner.evaluate(
            loaded,
            own,
            against=dense,
            text=text,
            tokens=tokens,
            max_length=max_length,
            stride=stride,
            metrics=chosen,
            lambada=lambada,
            tasks=names_from([tasks] if tasks else None),
            include_path=include_path,
            limit=limit,
            device=device,
            seed=seed,
            progress=progress,
        )
    named = None if against is None else name_of(against)
    found = replace(found, model=name_of(model), against=named, command=command_line())
    emit(found.to_json(), json)
    if str(json) != "-":
        show(evaluation_table(found))
    failed = found.failed(increase, max_lambada_drop)
    for line in failed:
        typer.echo(f"sspruner: {line}", err=True)
    if failed:
        raise typer.Exit(1)
