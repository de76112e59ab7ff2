"""`sspruner compare`: scorers against cuts, in one table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sspruner.cli import options as o
from sspruner.cli.console import (
    check_json,
    command_line,
    emit,
    fractions_from,
    live_table,
    names_from,
    options_from,
    prepare,
    ratios_from,
    reports_errors,
    show,
)

NAME = "compare"
PASSAGES = 500  # of LAMBADA


@reports_errors
def command(
    model: o.Model = None,
    scorer: Annotated[
        list[str] | None,
        typer.Option(
            "--scorer",
            "--scorers",
            help="Scorers, separated by commas. Repeatable.",
            show_default="ghost, and all that need only weights",
        ),
    ] = None,
    axis: Annotated[str, typer.Option(help="What to remove; one axis.")] = "state",
    sparsity: Annotated[
        list[str] | None,
        typer.Option(
            help="Fractions to remove, separated by commas: a column each. Repeatable.",
            show_default="0.25,0.5,0.75,0.9",
        ),
    ] = None,
    metrics: Annotated[str, typer.Option(help="What to measure: any of ppl, kl, lambada, recall.")] = "ppl,kl",
    lambada: Annotated[
        str | None, typer.Option(help="For lambada: file of JSON lines with a text each, or a datasets name.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="A smaller dense model with the same tokenizer, to stand beside the cuts.")
    ] = None,
    allocation: o.Allocation = "uniform",
    multiple_of: o.MultipleOf = 1,
    ratio: o.Ratio = None,
    ignore: o.Ignore = None,
    normalise: o.Normalise = None,
    calibration: o.Calibration = "self",
    samples: o.Samples = 32,
    seq_len: o.SeqLen = 256,
    option: o.ScorerOption = None,
    device: o.Device = None,
    dtype: o.Dtype = "auto",
    tokenizer: o.Tokenizer = None,
    trust_remote_code: o.TrustRemoteCode = False,
    seed: o.Seed = 0,
    no_cache: o.NoCache = False,
    plugin: o.Plugin = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for JSON, Markdown, CSV and scores; what is finished there is not done again."),
    ] = None,
    json: o.Json = None,
) -> None:
    """Score with several scorers in one pass, cut by each to several sizes, and show what every cut costs."""
    import sspruner
    from sspruner.budgets.asked import make_budget
    from sspruner.comparison.compare import MARKS, SPARSITIES
    from sspruner.evaluation.last_word import passages, read_passages
    from sspruner.evaluation.measures import check_metrics
    from sspruner.files.output import check_results
    from sspruner.io.source import name_of
    from sspruner.reporting.table import comparison_table
    from sspruner.scoring.choice import DEFAULT
    from sspruner.scoring.known import find_scorer, installed_scorers

    check_json(json)
    if out is not None:
        check_results(out, MARKS)
    scorer_options, ratios = options_from(option), ratios_from(ratio)
    prepare(plugin)
    able = {name: cls for name, (cls, _) in sorted(installed_scorers().items()) if axis in cls.axes}
    quick = [name for name, cls in able.items() if name == DEFAULT or cls.needs == "weights"]
    scorers = names_from(scorer) or quick or [DEFAULT]
    for name in scorers:
        find_scorer(name)
    sparsities = fractions_from(sparsity, "--sparsity") or SPARSITIES
    for fraction in sparsities:
        make_budget(axis, fraction, None, allocation, multiple_of, ratios, ignore or [], normalise=normalise)
    measures = names_from([metrics])
    check_metrics(measures, bool(lambada))
    with live_table(comparison_table) as (progress, on_row):
        loaded, tokenizer = sspruner.load(model, tokenizer=tokenizer, dtype=dtype, trust_remote_code=trust_remote_code)
        small = baseline and sspruner.load(baseline, dtype=dtype, trust_remote_code=trust_remote_code)[0]
        name = name_of(model)
        found = sspruner.compare(
            loaded,
            scorers,
            sparsities=sparsities,
            metrics=measures,
            axis=axis,
            allocation=allocation,
            multiple_of=multiple_of,
            ratios=ratios,
            ignore=ignore or [],
            normalise=normalise,
            calibration=calibration,
            samples=samples,
            seq_len=seq_len,
            tokenizer=tokenizer,
            passages=passages(tokenizer, read_passages(lambada), PASSAGES, seed) if lambada else (),
            baseline=small or None,
            options=scorer_options,
            device=device,
            seed=seed,
            cache=not no_cache,
            out=out,
            progress=progress,
            on_row=lambda known: on_row(known.named(name, "", baseline)),
        )
    found = found.named(name, command_line(), baseline)
    if out is not None:
        found.save(out)
    emit(found.to_json(), json)
    if str(json) != "-":
        show(comparison_table(found))
