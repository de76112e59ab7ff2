"""`sspruner compare`: scorers against cuts, in one table."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Optional

import typer

from sspruner.cli import options as o
from sspruner.cli.console import (
    check_json,
    emit,
    options_from,
    prepare,
    progress_bar,
    ratios_from,
    reports_errors,
    show,
)

NAME = "compare"


@reports_errors
def command(
    model: o.Model = None,
    scorer: Annotated[
        Optional[list[str]],
        typer.Option(help="Scorer. Repeatable.", show_default="ghost, and all that need only weights"),
    ] = None,
    axis: Annotated[str, typer.Option(help="What to remove; one axis.")] = "state",
    sparsity: Annotated[
        Optional[list[float]],
        typer.Option(help="Fraction to remove. Repeatable: a column each.", show_default="0.25 0.5 0.75 0.9"),
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
    json: o.Json = None,
) -> None:
    """Score with several scorers in one pass, cut by each to several sizes, and show what every cut costs."""
    import sspruner
    from sspruner.asked import DEFAULT, make_budget
    from sspruner.comparison import SPARSITIES
    from sspruner.io.load import name_of
    from sspruner.plugins import manager
    from sspruner.report.table import comparison_table

    check_json(json)
    scorer_options, ratios = options_from(option), ratios_from(ratio)
    prepare(plugin)
    able = {name: cls for name, (cls, _) in sorted(manager.scorers().items()) if axis in cls.axes}
    quick = [name for name, cls in able.items() if name == DEFAULT or cls.needs == "weights"]
    scorers = scorer or quick or [DEFAULT]
    for name in scorers:
        manager.scorer(name)
    for fraction in sparsity or SPARSITIES:
        make_budget(axis, fraction, None, allocation, multiple_of, ratios, ignore or [], normalise=normalise)
    with progress_bar() as progress:
        loaded, tokenizer = sspruner.load(model, tokenizer=tokenizer, dtype=dtype, trust_remote_code=trust_remote_code)
        found = sspruner.compare(
            loaded,
            scorers,
            sparsities=sparsity or SPARSITIES,
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
            options=scorer_options,
            device=device,
            seed=seed,
            cache=not no_cache,
            progress=progress,
        )
    found = replace(found, model=name_of(model))
    emit(found.to_json(), json)
    if str(json) != "-":
        show(comparison_table(found))
