"""`sspruner compare`: scorers and cuts, in one table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sspruner.cli.console import command_line, emit, prepare, reports_errors, show
from sspruner.cli.help import command_app
from sspruner.cli.machine import OUTPUT, Json, Machine, Model, RecipeFile
from sspruner.recipes.compare import CompareRecipe

NAME = "compare"


@Parameter(name="*", group=OUTPUT)
@dataclass(frozen=True)
class Tables(Json):
    """Output of the tables."""

    out: Annotated[Path | None, Parameter(metavar="DIR")] = None
    """Folder for JSON, Markdown, CSV, scores and the recipe; finished rows are reused."""

    def check(self) -> None:
        """Raise InputError, before any work, if a file or the folder cannot be written."""
        from sspruner.comparison.values import MARKS
        from sspruner.files.output import check_results

        super().check()
        if self.out is not None:
            check_results(self.out, MARKS)


@reports_errors
def command(
    model: Model = None,
    /,
    *,
    file: RecipeFile = None,
    recipe: CompareRecipe = CompareRecipe(),
    machine: Machine = Machine(),
    output: Tables = Tables(),
) -> None:
    """Run `sspruner compare`.

    Examples:
        sspruner compare path/to/model --scorers ghost,magnitude --sparsity 0.5,0.75
        sspruner compare path/to/model --recipe compared/recipe.yaml --axis head
    """
    from sspruner.comparison.values import check_values

    check_values(recipe)
    output.check()

    import sspruner
    from sspruner.comparison.compare import check_recipe
    from sspruner.compute.progress import live_table
    from sspruner.io.source import name_of
    from sspruner.reporting.table import comparison_table

    prepare(machine.plugin, model)
    recipe, baseline = check_recipe(recipe), recipe.cells.baseline
    with live_table(comparison_table) as (progress, on_row):
        loaded, tokenizer = sspruner.load(model, **machine.arguments)
        small = sspruner.load(baseline, **(machine.arguments | {"tokenizer": None}))[0] if baseline else None
        name = name_of(model)
        comparison = sspruner.compare(
            loaded,
            recipe,
            tokenizer=tokenizer,
            device=machine.device,
            cache=not machine.no_cache,
            out=output.out,
            progress=progress,
            baseline=small,
            on_row=lambda partial: on_row(partial.named(name, "", baseline)),
        )
    comparison = comparison.named(name, command_line(), baseline)
    if output.out is not None:
        comparison.save(output.out)
    emit(comparison.to_json(), output.json)
    if not output.only:
        show(comparison_table(comparison))


app = command_app(NAME, command)
