"""Leaderboard: recipes x models x seeds in one folder, to which each call adds what is missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from sspruner.comparison.board import FILE, Leaderboard, Row, Settings
from sspruner.comparison.compare import check_recipe
from sspruner.comparison.leaderboard import CELLS, Place, filled
from sspruner.compute.device import resolve_device
from sspruner.compute.settings import undisturbed
from sspruner.errors import InputError
from sspruner.files.output import atomic_file, check_results, write_file
from sspruner.io.load import load
from sspruner.io.source import DEFAULT
from sspruner.recipes.common import recipe_or_short
from sspruner.recipes.compare import CompareRecipe
from sspruner.recipes.leaderboard import MEASURED, SEEDS, WINDOWS, Board
from sspruner.recipes.parts import Budget, Method
from sspruner.recipes.recipe import Recipe
from sspruner.recipes.yaml import to_data
from sspruner.reporting.board import picture
from sspruner.reporting.figures import png

MARKS = (FILE, CELLS)  # a folder with one of these is a leaderboard
PICTURE = "leaderboard.png"


def _check_asked(recipe: CompareRecipe, has_rows: bool) -> None:
    """Raise InputError for options of a table that a leaderboard would ignore; without rows, for those of a row."""
    usual, cells = CompareRecipe(), recipe.cells
    parts = () if has_rows else ("remove", "budget", "method", "reconstruction")
    of_rows = [f.name for part in parts for f in fields(getattr(usual, part)) if f.name != "seed"
               and getattr(getattr(recipe, part), f.name) != getattr(getattr(usual, part), f.name)]  # fmt: skip
    if of_rows:
        raise InputError(f"leaderboard: {', '.join(of_rows)}: says how a row is made, and none is named; add "
                         "--scorers, or leave it out")  # fmt: skip
    asked = {
        "--metrics": cells.metrics != usual.cells.metrics,
        "--lambada": cells.lambada is not None,
        "--baseline": cells.baseline is not None,
    }
    if given := [name for name, is_given in asked.items() if is_given]:
        raise InputError(f"leaderboard: {', '.join(given)}: every row has the same measures; leave it out, or make a "
                         "table with --out")  # fmt: skip
    if recipe.method.seed != usual.method.seed:
        raise InputError(f"leaderboard: --seed {recipe.method.seed}: rows are made with several seeds; give --seeds")


@undisturbed
def leaderboard(
    out: str | Path,
    recipe: Any = None,
    board: Board | None = None,
    *,
    load: Callable[[str], tuple[Any, Any]] = load,
    device: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    **short: Any,
) -> Leaderboard:
    """Add rows to the leaderboard in a folder, or start one: prune every model by every recipe with every seed.

    What the folder holds is kept; models and seeds of this call are added for all rows. Writes leaderboard.json,
    leaderboard.md and leaderboard.png after every entry.

    Args:
        out: the folder. Cells that are measured are kept there, so that an interrupted call continues.
        recipe: a `CompareRecipe`, each scorer of which is a row; or scorers. Without scorers an existing leaderboard
            gets no new row.
        board: the models, seeds and text. Without models those of the folder, else the reference model.
        load: name -> model and tokenizer.
        device: the compute device; CUDA if there is one, else the CPU.
        progress: called with (phase, done, total).
        short: instead of a recipe or a board, fields of them: `leaderboard("out", ["ghost"], seeds=(0, 1))`.

    Raises:
        InputError: for cuts or texts other than those of the folder, for another model of the same name, for a recipe
            that was calibrated on the text that is measured, for metrics, a baseline or a seed of the recipe, and for
            its other parts where it names no scorers.
    """
    board = board or Board(**{f.name: short.pop(f.name) for f in fields(Board) if f.name in short})
    if isinstance(recipe, CompareRecipe):
        recipe = recipe_or_short(CompareRecipe, recipe, short)
    else:
        recipe = CompareRecipe.of(recipe, **short)
    folder = check_results(out, MARKS)
    before = Leaderboard.load(folder) if (folder / FILE).exists() else None
    has_rows = before is None or recipe.cells.scorers is not None
    _check_asked(recipe, has_rows)
    if has_rows:
        recipe = check_recipe(replace(recipe, cells=replace(recipe.cells, metrics=("ppl",), lambada=None)))
    rows = {label_of(each): Row(_recipe_json(each)) for each in _recipes(recipe)}
    start = before or Leaderboard(_settings(recipe, board))
    settings = _extended(start.settings, recipe, board, folder)
    found = replace(start, settings=settings, rows=rows | start.rows)
    (folder / CELLS).mkdir(exist_ok=True)
    place = Place(load, folder / CELLS, resolve_device(device), progress)
    for further in filled(found, place, [*rows]):
        found = further
        save(found, folder)
    return found


def save(board: Leaderboard, folder: Path) -> None:
    """Write the JSON, the page and the picture, each atomically."""
    write_file(folder / FILE, board.to_json())
    write_file(folder / "leaderboard.md", board.to_markdown())
    with atomic_file(folder / PICTURE) as temporary:
        temporary.write_bytes(png(picture(board)))


def label_of(recipe: Recipe) -> str:
    """Return the label of a row: its scorer, and whatever else differs from a recipe's defaults."""
    data, usual = to_data(recipe), to_data(Recipe())
    parts = [str(recipe.method.scorer)]
    for part in ("remove", "elements", "budget", "method", "reconstruction"):
        if part == "reconstruction" and recipe.method.refit != "reconstruct":
            continue
        for name, value in data.get(part, {}).items():
            if name not in ("scorer", "seed") and value != usual.get(part, {}).get(name):
                parts.append(f"{name.replace('_', ' ')} {_listed(value)}")
    return ", ".join(parts)


def _listed(value: Any) -> str:
    return " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def _recipes(recipe: CompareRecipe) -> list[Recipe]:
    """Return the recipe of each row, without a fraction."""
    budget = Budget(**{f.name: getattr(recipe.budget, f.name) for f in fields(recipe.budget)})
    shared: dict[str, Any] = {"options": recipe.method.options, "refit": recipe.method.refit}
    return [
        Recipe(
            remove=recipe.remove,
            budget=budget,
            method=Method(scorer=scorer, **shared),
            reconstruction=recipe.reconstruction,
        )
        for scorer in recipe.cells.scorers or ()
    ]


def _recipe_json(recipe: Recipe) -> dict[str, Any]:
    data = recipe.to_json()
    del data["method"]["seed"]
    kept = ("remove", "elements", "budget", "method", "reconstruction")
    return {part: data[part] for part in kept if data.get(part)}


def _settings(recipe: CompareRecipe, board: Board) -> Settings:
    """Return the settings of a new leaderboard."""
    return Settings(
        board.models,
        board.seeds or SEEDS,
        tuple(map(float, recipe.cells.sparsities)),
        asdict(recipe.calibration),
        board.measured or MEASURED,
        board.windows or WINDOWS,
    )


def _extended(now: Settings, recipe: CompareRecipe, board: Board, folder: Path) -> Settings:
    """Return the settings of a folder with more models and seeds.

    What is left out, or a default of `CompareRecipe`, is that of the folder. Raises InputError for other cuts or texts.
    """
    usual = CompareRecipe()
    asked = {
        "sparsities": (tuple(map(float, recipe.cells.sparsities)), usual.cells.sparsities),
        "calibration": (asdict(recipe.calibration), asdict(usual.calibration)),
        "measured": (board.measured, None),
        "windows": (board.windows, None),
    }
    for name, (value, default) in asked.items():
        if value not in (default, getattr(now, name)):
            raise InputError(
                f"leaderboard {folder}: all its rows have {name} {getattr(now, name)}, not {value}; give another folder"
            )
    return replace(
        now,
        models=tuple(dict.fromkeys((*now.models, *board.models))) or (DEFAULT,),
        seeds=tuple(dict.fromkeys((*now.seeds, *board.seeds))),
    )
