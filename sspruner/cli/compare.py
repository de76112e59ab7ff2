"""`sspruner compare`: scorers against cuts, in one table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sspruner.cli.console import command_line, emit, prepare, reports_errors, show
from sspruner.cli.machine import OUTPUT, Json, Machine, Model, RecipeFile
from sspruner.recipes.compare import CompareRecipe

NAME = "compare"


@Parameter(name="*", group=OUTPUT)
@dataclass(frozen=True)
class Tables(Json):
    """Where the tables go."""

    out: Annotated[Path | None, Parameter(metavar="DIR")] = None
    """Folder for JSON, Markdown, CSV, scores and the recipe; what is finished there is not done again."""

    def check(self) -> None:
        """Raise InputError, before any work, if a file or the folder cannot be written."""
        from sspruner.comparison.compare import MARKS
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
    """Score with several scorers in one pass, cut by each to several sizes, and show what every cut costs.

    Examples:
        sspruner compare path/to/model --scorers ghost,magnitude --sparsity 0.5,0.75
        sspruner compare path/to/model --recipe compared/recipe.yaml --axis head
    """
    import sspruner
    from sspruner.comparison.compare import check_recipe
    from sspruner.compute.progress import live_table
    from sspruner.io.source import name_of
    from sspruner.reporting.table import comparison_table

    output.check()
    prepare(machine.plugin)
    recipe, baseline = check_recipe(recipe), recipe.cells.baseline
    with live_table(comparison_table) as (progress, on_row):
        loaded, tokenizer = sspruner.load(model, **machine.arguments)
        small = sspruner.load(baseline, **(machine.arguments | {"tokenizer": None}))[0] if baseline else None
        name = name_of(model)
        found = sspruner.compare(
            loaded,
            recipe,
            tokenizer=tokenizer,
            device=machine.device,
            cache=not machine.no_cache,
            out=output.out,
            progress=progress,
            baseline=small,
            on_row=lambda known: on_row(known.named(name, "", baseline)),
        )
    found = found.named(name, command_line(), baseline)
    if output.out is not None:
        found.save(output.out)
    emit(found.to_json(), output.json)
    if not output.only:
        show(comparison_table(found))
