"""`sspruner score`: the first step of prune, through a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sspruner.cli import options as o
from sspruner.cli.console import options_from, prepare, progress_bar, reports_errors, scorers_from

NAME = "score"


@reports_errors
def command(
    model: o.Model = None,
    scorer: o.Scorer = "ghost",
    axis: o.ScoredAxes = "state",
    calibration: o.Calibration = "self",
    samples: o.Samples = 32,
    seq_len: o.SeqLen = 256,
    option: o.ScorerOption = None,
    device: o.Device = None,
    dtype: o.Dtype = "auto",
    seed: o.Seed = 0,
    plugin: o.Plugin = None,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("scores.safetensors"),
) -> None:
    """Score every unit of an axis on the dense model and write scores.safetensors."""
    import sspruner
    from sspruner.io.output import check_file
    from sspruner.plugins import manager

    scorer_options = options_from(option)
    check_file(out)
    prepare(plugin)
    scorers = scorers_from(scorer)
    for name in scorers.values() if isinstance(scorers, dict) else [scorers]:
        manager.scorer(name)
    with progress_bar() as progress:
        loaded, tokenizer = sspruner.load(model, dtype=dtype)
        scores = sspruner.score(
            loaded,
            scorers,
            axis=[part.strip() for part in axis.split(",")],
            calibration=calibration,
            samples=samples,
            seq_len=seq_len,
            tokenizer=tokenizer,
            options=scorer_options,
            device=device,
            seed=seed,
            progress=progress,
        )
    scores.save(out)
    typer.echo(f"{len(scores.importance)} dependency groups scored by {scorer} in {out}")
