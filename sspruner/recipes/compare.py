"""CompareRecipe: several scorers, several cuts, one text; the argument of `compare`, and a YAML file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any

from cyclopts import Parameter

from sspruner.errors import InputError
from sspruner.recipes.common import Recorded, made_of
from sspruner.recipes.parts import REPEATED, Allocation, CalibrationText, Remove, Scoring
from sspruner.recipes.texts import names_of

SPARSITIES = (0.25, 0.5, 0.75, 0.9)

#: The calibration text may also be given as `calibration=`, as on the command line.
SHORT = {"calibration": "source"}


@Parameter(name="*", group="What to compare")
@dataclass(frozen=True)
class Cells:
    """The rows and columns of the table, and what is measured in each cell."""

    scorers: Annotated[tuple[str, ...] | None, REPEATED, Parameter(name=("--scorer", "--scorers"))] = None
    """Scorers, separated by commas. Repeatable. Default: ghost, and all that need only weights."""

    sparsities: Annotated[tuple[float | str, ...], REPEATED, Parameter(name="--sparsity")] = SPARSITIES
    """Fractions to remove, separated by commas: a column each. Repeatable."""

    metrics: Annotated[tuple[str, ...], REPEATED] = ("ppl", "kl")
    """What to measure: any of ppl, kl, lambada, recall, separated by commas."""

    lambada: str | None = None
    """For lambada: file of JSON lines with a text each, or a datasets name."""

    baseline: str | None = None
    """A smaller dense model with the same tokenizer, to stand beside the cuts."""

    def __post_init__(self) -> None:
        """Read texts such as `ghost,magnitude` and `0.25,0.5`."""
        if self.scorers is not None:
            object.__setattr__(self, "scorers", tuple(_scorers(self.scorers)))  # in Python classes, too
        object.__setattr__(self, "sparsities", tuple(_fractions(self.sparsities)))
        object.__setattr__(self, "metrics", tuple(names_of(_several(self.metrics))))


@Parameter(name="*")
@dataclass(frozen=True)
class CompareRecipe(Recorded):
    """Which scorers and which cuts to compare, on which axis, and by which text.

    `CompareRecipe.load("c.yaml")` reads one, `recipe.save("c.yaml")` writes one;
    `CompareRecipe.of(["ghost", "magnitude"], axis="head")` makes one from the fields of its parts.
    """

    cells: Cells = field(default_factory=Cells)
    remove: Remove = field(default_factory=Remove)
    budget: Allocation = field(default_factory=Allocation)
    method: Scoring = field(default_factory=Scoring)
    calibration: CalibrationText = field(default_factory=CalibrationText)

    def __post_init__(self) -> None:
        if not isinstance(self.remove.axis, str):
            raise InputError(f"compare: one axis, whose fractions are --sparsity; not {self.remove.axis}")

    @property
    def axis(self) -> str:
        """The axis that is cut."""
        return str(self.remove.axis)

    @classmethod
    def of(cls, scorers: Any = None, **short: Any) -> CompareRecipe:
        """Make a recipe from the fields of its parts: `CompareRecipe.of(["ghost", "random"], sparsities=(0.5,))`.

        Raises InputError for an unknown field, with the nearest known one.
        """
        return made_of(cls, {"scorers": scorers, **short}, SHORT)


def _several(given: Any) -> list[Any]:
    return [given] if isinstance(given, str | float | int) else list(given)


def _scorers(given: Any) -> list[Any]:
    """Names, several in one text; classes and mappings (a name for each axis) as they are; each once, in order."""
    found: list[Any] = []
    for one in _several(given):
        found += [other for other in (names_of([one]) if isinstance(one, str) else [one]) if other not in found]
    return found


def _fractions(given: Any) -> Iterable[float]:
    for one in _several(given):
        for text in names_of([one]) if isinstance(one, str) else [one]:
            try:
                yield float(text)
            except ValueError:
                raise InputError(f"--sparsity: {text!r} is not a number") from None
