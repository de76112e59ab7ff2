"""CompareRecipe: several scorers, several cuts, one text; the argument of `compare`, and a YAML file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from cyclopts import Group, Parameter

from sspruner.errors import InputError
from sspruner.recipes.common import Recorded, build
from sspruner.recipes.flags import FromText, read_texts, text, texts
from sspruner.recipes.lists import fractions_in, names_in
from sspruner.recipes.parts import Allocation, CalibrationText, Reconstruction, Refitting, Remove, Scoring

CELLS = Group("What to compare", sort_key=0.5)
SPARSITIES = (0.25, 0.5, 0.75, 0.9)
METRICS = ("ppl", "kl", "lambada", "recall")

#: The calibration text may also be given as `calibration=`, as on the command line.
SHORT = {"calibration": "source"}


@Parameter(name="*", group=CELLS)
@dataclass(frozen=True)
class Cells:
    """The rows and columns of the table, and the measures of each cell.

    In Python a scorer may also be a class.
    """

    scorers: Annotated[
        tuple[str, ...] | None,
        texts("NAME"),
        Parameter(name=("--scorer", "--scorers"), show_default="ghost, and all that need only weights"),
        FromText(names_in, "--scorer"),
    ] = None
    """Scorers, separated by commas. Repeatable."""

    sparsities: Annotated[
        tuple[float, ...],
        texts("FRACTION", name="--sparsity"),
        Parameter(show_default="0.25,0.5,0.75,0.9"),
        FromText(fractions_in, "--sparsity"),
    ] = SPARSITIES
    """Fractions to remove, separated by commas: a column each. Repeatable."""

    metrics: Annotated[tuple[str, ...], text("NAME,NAME", default="ppl,kl"), FromText(names_in, "--metrics")] = (
        "ppl",
        "kl",
    )
    """What to measure: any of ppl, kl, lambada, recall, separated by commas."""

    lambada: Annotated[str | None, text("TEXT")] = None
    """For lambada: file of JSON lines with a text each, or a datasets name."""

    baseline: Annotated[str | None, text("MODEL")] = None
    """A smaller dense model with the same tokenizer, to compare with the cuts."""

    def __post_init__(self) -> None:
        """Read texts such as `ghost,magnitude` and `0.25,0.5`."""
        read_texts(self)


@Parameter(name="*")
@dataclass(frozen=True)
class CompareMethod(Refitting, Scoring):
    """Options and seed of scorers, and the refit of every cut."""

    def __post_init__(self) -> None:
        """Read texts, and raise InputError for an unknown refit."""
        Scoring.__post_init__(self)
        Refitting.__post_init__(self)


@Parameter(name="*")
@dataclass(frozen=True)
class CompareRecipe(Recorded):
    """The scorers and cuts to compare, on which axis, and on which text.

    `CompareRecipe.load("c.yaml")` reads one, `recipe.save("c.yaml")` writes one;
    `CompareRecipe.of(["ghost", "magnitude"], axis="head")` makes one from the fields of its parts.
    """

    cells: Cells = field(default_factory=Cells)
    remove: Remove = field(default_factory=Remove)
    budget: Allocation = field(default_factory=Allocation)
    method: CompareMethod = field(default_factory=CompareMethod)
    reconstruction: Reconstruction = field(default_factory=Reconstruction)
    calibration: CalibrationText = field(default_factory=CalibrationText)

    def __post_init__(self) -> None:
        if not isinstance(self.remove.axis, str):
            raise InputError(f"compare: one axis, whose fractions are --sparsity; not {self.remove.axis}")

    @property
    def axis(self) -> str:
        """Return the axis that is cut."""
        return str(self.remove.axis)

    @classmethod
    def of(cls, scorers: Any = None, **short: Any) -> CompareRecipe:
        """Make a recipe from the fields of its parts: `CompareRecipe.of(["ghost", "random"], sparsities=(0.5,))`.

        Raises InputError for an unknown field, with the nearest known one.
        """
        return build(cls, {"scorers": scorers, **short}, SHORT)


def check_metrics(metrics: Sequence[str], passages: bool) -> None:
    """Raise InputError for an unknown metric, and for LAMBADA without passages."""
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise InputError(f"metrics {', '.join(unknown) or 'none'}: choose among {', '.join(METRICS)}")
    if ("lambada" in metrics) != passages:
        raise InputError("metric lambada and its passages go together: name a file with --lambada")
