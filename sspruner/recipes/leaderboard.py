"""Board: the models, seeds and text of a leaderboard. Its rows and cuts are those of a `CompareRecipe`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Group, Parameter

from sspruner.errors import InputError
from sspruner.recipes.flags import FromText, read_texts, text, texts, whole
from sspruner.recipes.lists import names_in, seeds_in

BOARD = Group("Leaderboard", sort_key=0.7)
SEEDS, MEASURED, WINDOWS = (0, 1, 2), "page", 32  # of a new leaderboard


@Parameter(name="*", group=BOARD)
@dataclass(frozen=True)
class Board:
    """With --leaderboard: the models, seeds and text that all rows share."""

    models: Annotated[
        tuple[str, ...],
        texts("MODEL"),
        Parameter(show_default="MODEL, and those of the leaderboard"),
        FromText(names_in, "--models"),
    ] = ()
    """Models, separated by commas. Repeatable."""

    seeds: Annotated[
        tuple[int, ...],
        texts("N"),
        Parameter(show_default="0,1,2, or those of the leaderboard"),
        FromText(seeds_in, "--seeds"),
    ] = ()
    """Seeds of calibration text and scorers, separated by commas: each row is made with every one. Repeatable."""

    measured: Annotated[str | None, text("TEXT", name="--text", default="page, or that of the leaderboard")] = None
    """The text to measure on, as for --calibration. What a row was calibrated on is refused."""

    windows: Annotated[int | None, whole(default="32, or those of the leaderboard")] = None
    """Windows of --seq-len tokens of this text; fewer if it is shorter."""

    def __post_init__(self) -> None:
        """Read texts such as `0,1,2`, and raise InputError for no windows."""
        read_texts(self)
        if self.windows is not None and self.windows < 1:
            raise InputError(f"windows {self.windows}: must be at least 1")
