"""`sspruner score`: the first step of prune, through a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from sspruner.cli import options as o
from sspruner.cli.console import (
    from_cache,
    options_from,
    prepare,
    progress_bar,
    reports_errors_of_all,
    scorers_from,
    sizes_from,
)
from sspruner.errors import InputError

NAME = "score"


@reports_errors_of_all
def command(
    model: o.Model = None,
    scorer: o.Scorers = None,
    axis: o.ScoredAxes = "state",
    calibration: o.Calibration = "self",
    samples: o.Samples = 32,
    seq_len: o.SeqLen = 256,
    option: o.ScorerOption = None,
    device: o.Device = None,
    dtype: o.Dtype = "auto",
    tokenizer: o.Tokenizer = None,
    trust_remote_code: o.TrustRemoteCode = False,
    seed: o.Seed = 0,
    device_map: o.DeviceMap = None,
    max_memory: o.MaxMemory = None,
    no_cache: o.NoCache = False,
    plugin: o.Plugin = None,
    curves: Annotated[
        Optional[Path],
        typer.Option(help="Also measure what cutting each layer alone costs, for `plan --allocation adaptive`."),
    ] = None,
    out: Annotated[
        Optional[Path],
        typer.Option(
            help="File to write; of several scorers a folder, for a file each.",
            show_default="scores.safetensors, or scores",
        ),
    ] = None,
) -> None:
    """Score every unit of an axis on the dense model and write scores.safetensors, or one file for each scorer."""
    import sspruner
    from sspruner.compute.processes import barrier, rank
    from sspruner.files.output import check_file
    from sspruner.scoring.known import find_scorer

    names = scorer or ["ghost"]
    if out is None:
        out = Path("scores.safetensors" if len(names) == 1 else "scores")
    files = [out] if len(names) == 1 else [out / f"{_file_name(name)}.safetensors" for name in names]
    scorer_options = options_from(option)
    if curves:
        check_file(curves)
        if len(names) > 1:
            raise InputError("--curves measures the layers of one scorer; name one")
    if len(files) > 1 and out.exists() and not out.is_dir():
        raise InputError(f"output {out}: is a file; of several scorers give a folder")
    check_file(out if len(files) == 1 else out.parent / f"{out.name}.safetensors")
    prepare(plugin)
    scorers = [scorers_from(name) for name in names]
    for each in scorers:
        for name in each.values() if isinstance(each, dict) else [each]:
            find_scorer(name)
    with progress_bar() as progress:
        loaded, tokenizer = sspruner.load(
            model,
            tokenizer=tokenizer,
            dtype=dtype,
            device_map=device_map,
            max_memory=sizes_from(max_memory),
            trust_remote_code=trust_remote_code,
        )
        source: str | sspruner.Calibration = calibration
        if curves:  # scored and measured on the same text
            source = sspruner.calibration(
                calibration, loaded, tokenizer, samples=samples, seq_len=seq_len, seed=seed, progress=progress
            )
        found = sspruner.score(
            loaded,
            scorers,
            axis=[part.strip() for part in axis.split(",")],
            calibration=source,
            samples=samples,
            seq_len=seq_len,
            tokenizer=tokenizer,
            options=scorer_options,
            device=device,
            seed=seed,
            cache=not no_cache,
            progress=progress,
        )
        if curves and isinstance(source, sspruner.Calibration):
            (only,) = found.values()
            measured = sspruner.sensitivity(loaded, only, source, device=device, progress=progress)
    if rank() == 0:
        if curves:
            measured.save(curves)
        if len(files) > 1:
            out.mkdir(exist_ok=True)
        for file, name, scores in zip(files, names, found.values(), strict=True):
            scores.save(file)
            typer.echo(f"{len(scores.importance)} dependency groups scored by {name} in {file}{from_cache(scores)}")
        if curves:
            typer.echo(f"damage of cutting each layer alone, on {measured.tokens:,} tokens, in {curves}")
    barrier()


def _file_name(scorer: str) -> str:
    """A scorer's name, or its names by axis, as a file name."""
    return "".join(c if c.isalnum() or c in "-_=" else "-" for c in scorer)
