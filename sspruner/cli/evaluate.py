"""`sspruner evaluate`: what a model can do, alone or against the dense one."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from cyclopts import Parameter

from sspruner.cli.console import command_line, emit, prepare, reports_errors, show, warn
from sspruner.cli.machine import MODEL, Computing, Json, Model
from sspruner.errors import InputError
from sspruner.recipes.flags import text
from sspruner.recipes.measure import EvaluateOptions, Gates

NAME = "evaluate"

Against = Annotated[
    str | None,
    text("MODEL"),
    Parameter(group=MODEL, help="Folder or hub id of the dense model: all is measured of both, paired."),
]


@reports_errors
def command(
    model: Model = None,
    /,
    *,
    against: Against = None,
    options: EvaluateOptions = EvaluateOptions(),
    gates: Gates = Gates(),
    machine: Computing = Computing(),
    output: Json = Json(),
) -> None:
    """Measure perplexity, recall and tasks, with intervals, alone or against the dense model; gates for CI.

    Examples:
        sspruner evaluate smaller --against dense --text t.txt --max-ppl-increase 2%
        sspruner evaluate path/to/model --metrics recall,passkey --json recall.json
    """
    import sspruner
    from sspruner.compute.progress import bars
    from sspruner.io.source import name_of
    from sspruner.reporting.evaluation import evaluation_table

    output.check()
    check_gates(gates, options, against)
    prepare(machine.plugin)
    with bars() as progress:
        loaded, tokenizer = sspruner.load(model, **machine.arguments)
        dense = None
        if against is not None:
            dense, theirs = sspruner.load(against, **(machine.arguments | {"tokenizer": None}))
            tokenizer = tokenizer or theirs
        found = sspruner.evaluate(
            loaded, tokenizer, options, against=dense, device=machine.device, progress=progress
        )  # fmt: skip
    named = None if against is None else name_of(against)
    found = replace(found, model=name_of(model), against=named, command=command_line())
    emit(found.to_json(), output.json)
    if not output.only:
        show(evaluation_table(found))
    failed = found.failed(gates.max_ppl_increase, gates.max_lambada_drop)
    for line in failed:
        warn(f"sspruner: {line}")
    if failed:
        raise SystemExit(1)


def check_gates(gates: Gates, options: EvaluateOptions, against: str | None) -> None:
    """Raise InputError for a gate whose row is not measured."""
    from sspruner.evaluation.evaluate import METRICS

    measures = options.measures
    metrics = METRICS if measures.metrics is None else measures.metrics
    if gates.max_ppl_increase is not None and (against is None or "perplexity" not in metrics):
        raise InputError(
            "--max-ppl-increase compares perplexity with the dense model's: give --against DENSE, and perplexity among "
            "--metrics"
        )
    if gates.max_lambada_drop is not None and (against is None or measures.lambada is None):
        raise InputError(
            "--max-lambada-drop compares LAMBADA's accuracy with the dense model's: give --against DENSE and --lambada"
        )
