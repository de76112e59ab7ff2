"""`sspruner evaluate`: measure a model, alone or against the dense one."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from cyclopts import Parameter

from sspruner.cli.console import command_line, emit, prepare, reports_errors, show, warn
from sspruner.cli.help import command_app
from sspruner.cli.machine import MODEL, Computing, Json, Model
from sspruner.errors import InputError
from sspruner.recipes.flags import text
from sspruner.recipes.measure import EvaluateOptions, Gates

NAME = "evaluate"

Against = Annotated[
    str | None,
    text("MODEL"),
    Parameter(group=MODEL, help="Folder or hub id of the dense model; both are measured, paired."),
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
    """Run `sspruner evaluate`.

    Examples:
        sspruner evaluate smaller --against dense --text t.txt --max-ppl-increase 2%
        sspruner evaluate path/to/model --metrics recall,passkey --json recall.json
        sspruner evaluate smaller --against dense --text t.txt --state-dtype int8
    """
    check_gates(gates, options, against)
    output.check()

    import sspruner
    from sspruner.compute.progress import bars
    from sspruner.io.source import name_of
    from sspruner.reporting.evaluation import evaluation_table

    prepare(machine.plugin, model)
    with bars() as progress:
        loaded, tokenizer = sspruner.load(model, **machine.arguments)
        dense = None
        if against is not None:
            dense, dense_tokenizer = sspruner.load(against, **(machine.arguments | {"tokenizer": None}))
            tokenizer = tokenizer or dense_tokenizer
        evaluation = sspruner.evaluate(
            loaded, tokenizer, options, against=dense, device=machine.device, progress=progress
        )  # fmt: skip
    against_name = None if against is None else name_of(against)
    evaluation = replace(evaluation, model=name_of(model), against=against_name, command=command_line())
    emit(evaluation.to_json(), output.json)
    if not output.only:
        show(evaluation_table(evaluation))
    failed = evaluation.failed(gates.max_ppl_increase, gates.max_lambada_drop)
    for line in failed:
        warn(f"sspruner: {line}")
    if failed:
        raise SystemExit(1)


def check_gates(gates: Gates, options: EvaluateOptions, against: str | None) -> None:
    """Raise InputError for a gate whose metric is not measured."""
    measures = options.measures
    if gates.max_ppl_increase is not None and (against is None or "perplexity" not in options.chosen):
        raise InputError(
            "--max-ppl-increase compares perplexity with the dense model's: give --against DENSE, and perplexity among "
            "--metrics"
        )
    if gates.max_lambada_drop is not None and (against is None or measures.lambada is None):
        raise InputError(
            "--max-lambada-drop compares LAMBADA's accuracy with the dense model's: give --against DENSE and --lambada"
        )


app = command_app(NAME, command)
