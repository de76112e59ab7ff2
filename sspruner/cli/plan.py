"""`sspruner plan`: from scores and a budget to plan.json."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sspruner.cli.console import prepare, reports_errors, say, warn
from sspruner.cli.machine import OUTPUT, Model, Reading
from sspruner.errors import InputError
from sspruner.recipes.flags import AMOUNT, REMOVE, FromText, text
from sspruner.recipes.parts import Budget, Elements, Remove, Target
from sspruner.recipes.recipe import Recipe
from sspruner.recipes.texts import fractions_by_axis

NAME = "plan"


@Parameter(name="*", group=REMOVE)
@dataclass(frozen=True)
class Fractions(Remove):
    """What to leave alone, and the fraction of each axis; the scores say which axes there are."""

    axis: Annotated[dict[str, float] | str | None, text("AXIS=FRACTION"), FromText(fractions_by_axis, "--axis")] = None  # type: ignore[assignment]
    """Fractions by axis: state=0.5,head=0.25."""

    def __post_init__(self) -> None:
        """Read the fractions."""
        super().__post_init__()
        if isinstance(self.axis, str):
            raise InputError(
                f"--axis {self.axis}: give a fraction for it, {self.axis}=0.5; the scores say which axes there are"
            )


@Parameter(name="*")
@dataclass(frozen=True)
class Files:
    """What is read, and the plan that is written."""

    scores: Annotated[Path, Parameter(metavar="FILE", group=REMOVE)] = Path("scores.safetensors")
    """What `sspruner score` wrote."""

    curves: Annotated[Path | None, Parameter(metavar="FILE", group=AMOUNT)] = None
    """What `sspruner score --curves` wrote, for --allocation adaptive."""

    out: Annotated[Path, Parameter(metavar="FILE", group=OUTPUT)] = Path("plan.json")
    """File to write."""


@reports_errors
def command(
    model: Model = None,
    /,
    *,
    files: Files = Files(),
    remove: Fractions = Fractions(),
    elements: Elements = Elements(),
    budget: Budget = Budget(),
    target: Target = Target(),
    reading: Reading = Reading(),
) -> None:
    """Decide what to keep: scores and a budget become plan.json.

    Examples:
        sspruner plan path/to/model --scores scores.safetensors --sparsity 0.75
        sspruner plan path/to/model --axis state=0.5,head=0.25 --ignore 'layers.0.*'
    """
    import sspruner
    from sspruner.files.output import check_file
    from sspruner.formats.fitting import check_cut
    from sspruner.formats.targets import chosen
    from sspruner.plans.plan import check_plan

    if remove.axis is not None and (budget.sparsity is not None or budget.keep is not None):
        raise InputError("give fractions by axis or one sparsity or keep for all, not both")
    recipe = Recipe(
        remove=Remove(ignore=remove.ignore) if remove.axis is None else replace(remove),
        elements=elements,
        budget=budget,
        target=target,
    )
    check_file(files.out)
    wanted = chosen(target.runtime, target.tp)
    prepare(reading.plugin)
    loaded, _ = sspruner.load(model, **reading.arguments)
    graph = sspruner.trace(loaded)
    read = sspruner.Scores.load(files.scores)
    measured = sspruner.Sensitivity.load(files.curves) if files.curves else None
    if measured:
        measured.check(read)
    made = sspruner.plan(graph, read, recipe, curves=measured.curves if measured else None)
    check_plan(made, graph, sspruner.fingerprint(loaded))
    if wanted:
        check_cut(loaded, made, graph, wanted)
    made.save(files.out)
    if changes := read.metadata.get("changes_weights"):
        warn(f"{changes} changes weights, too: only `sspruner prune` does that; this plan selects")
    for line in made.made_by["target"]["rounded"] if wanted else ():
        say(f"rounded for {wanted}: {line}")
    say(f"{made}\nin {files.out}")
