"""`sspruner compare`: scorers and cuts, in one table; or recipes x models x seeds, in a leaderboard."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sspruner.cli.console import command_line, emit, prepare, reports_errors, show
from sspruner.cli.help import command_app
from sspruner.cli.machine import OUTPUT, Json, Machine, Model, RecipeFile
from sspruner.errors import InputError
from sspruner.recipes.compare import CompareRecipe
from sspruner.recipes.leaderboard import Board

NAME = "compare"


@Parameter(name="*", group=OUTPUT)
@dataclass(frozen=True)
class Tables(Json):
    """Output of the tables."""

    out: Annotated[Path | None, Parameter(metavar="DIR")] = None
    """Folder for JSON, Markdown, CSV, scores and the recipe; finished rows are reused."""

    leaderboard: Annotated[Path | None, Parameter(metavar="DIR")] = None
    """Instead of a table: prune by each scorer, with every seed, and add it to the leaderboard in this folder."""

    def check(self) -> None:
        """Raise InputError, before any work, if a file or the folder cannot be written."""
        from sspruner.comparison.values import MARKS
        from sspruner.files.output import check_results

        super().check()
        if self.out is not None and self.leaderboard is not None:
            raise InputError("--out and --leaderboard: the first keeps a table, the second a leaderboard; give one")
        if self.out is not None:
            check_results(self.out, MARKS)


@reports_errors
def command(
    model: Model = None,
    /,
    *,
    file: RecipeFile = None,
    recipe: CompareRecipe = CompareRecipe(),
    board: Board = Board(),
    machine: Machine = Machine(),
    output: Tables = Tables(),
) -> None:
    """Run `sspruner compare`.

    Examples:
        sspruner compare path/to/model --scorers ghost,magnitude --sparsity 0.5,0.75
        sspruner compare path/to/model --recipe compared/recipe.yaml --axis head
        sspruner compare --leaderboard board --plugin mine.py --scorers mine
    """
    from sspruner.comparison.values import check_values

    check_values(recipe)
    output.check()
    if output.leaderboard is not None:
        add_rows(model, recipe, board, machine, output)
        return
    if board != Board():
        raise InputError("--models, --seeds, --text and --windows are of a leaderboard: add --leaderboard DIR")

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


def add_rows(model: str | None, recipe: CompareRecipe, board: Board, machine: Machine, output: Tables) -> None:
    """Add rows to the leaderboard in a folder, and print it."""
    import sspruner
    from sspruner.compute.progress import bars
    from sspruner.reporting.table import board_table

    if machine.no_cache:
        raise InputError(
            "leaderboard: --no-cache: no scores are cached there; to make every row again, give another folder"
        )
    prepare(machine.plugin)
    assert output.leaderboard is not None
    if model is not None:
        board = replace(board, models=tuple(dict.fromkeys((model, *board.models))))
    with bars() as progress:
        found = sspruner.leaderboard(
            output.leaderboard,
            recipe,
            board,
            load=partial(sspruner.load, **machine.arguments),
            device=machine.device,
            progress=progress,
        )
    emit(found.to_json(), output.json)
    if not output.only:
        show(board_table(found))


app = command_app(NAME, command)
