"""`sspruner prune`: the main job."""

from __future__ import annotations

import typer

from sspruner.cli import options as o
from sspruner.cli.console import (
    check_json,
    command_line,
    emit,
    options_from,
    prepare,
    progress_bar,
    reports_errors,
    show,
)

NAME = "prune"


@reports_errors
def command(
    model: o.Model = None,
    scorer: o.Scorer = "ghost",
    axis: o.Axis = "state",
    sparsity: o.Sparsity = None,
    keep: o.Keep = None,
    allocation: o.Allocation = "uniform",
    multiple_of: o.MultipleOf = 1,
    mode: o.Mode = "slice",
    one_shot: o.OneShot = False,
    calibration: o.Calibration = "self",
    samples: o.Samples = 32,
    seq_len: o.SeqLen = 256,
    option: o.ScorerOption = None,
    device: o.Device = None,
    dtype: o.Dtype = "auto",
    seed: o.Seed = 0,
    plugin: o.Plugin = None,
    out: o.Out = None,
    overwrite: o.Overwrite = False,
    json: o.Json = None,
) -> None:
    """Score, plan and cut a model layer by layer; prove the cut; show what it cost; save the result."""
    import sspruner
    from sspruner.io.load import name_of
    from sspruner.io.output import check_output
    from sspruner.planning.allocate import check_budget
    from sspruner.plugins import manager
    from sspruner.report.table import result_table

    if sparsity is None and keep is None:
        sparsity = 0.5
    check_budget(sparsity, keep, allocation, multiple_of)
    if out:
        check_output(out, overwrite)
    check_json(json)
    scorer_options = options_from(option)
    prepare(plugin)
    manager.scorer(scorer)  # an unknown name fails before the model is read
    with progress_bar() as progress:
        loaded, tokenizer = sspruner.load(model, dtype=dtype)
        result = sspruner.prune(
            loaded,
            scorer,
            sparsity=sparsity,
            keep=keep,
            axis=axis,
            allocation=allocation,
            multiple_of=multiple_of,
            mode=mode,
            one_shot=one_shot,
            calibration=calibration,
            samples=samples,
            seq_len=seq_len,
            tokenizer=tokenizer,
            options=scorer_options,
            device=device,
            seed=seed,
            progress=progress,
        ).named(name_of(model), command_line())
    if out:
        sspruner.save(result.model, out, tokenizer, result=result, overwrite=overwrite)
    emit(result.report.to_json(), json)
    if str(json) != "-":
        show(result_table(result.report))
        typer.echo(f"saved to {out}" if out else "nothing saved; add --out DIR to keep the pruned model")
