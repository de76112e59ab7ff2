"""`sspruner plan`: make plan.json from scores and a budget."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sspruner.cli.console import prepare, reports_errors, say, warn
from sspruner.cli.help import command_app
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
    """Layers to skip, and the fraction for each axis of the scores."""

    axis: Annotated[dict[str, float] | str | None, text("AXIS=FRACTION"), FromText(fractions_by_axis, "--axis")] = None  # type: ignore[assignment]
    """Fractions by axis: state=0.5,head=0.25."""

    def __post_init__(self) -> None:
        """Read the fractions. Raises InputError for an axis without one."""
        super().__post_init__()
        if isinstance(self.axis, str):
            raise InputError(
                f"--axis {self.axis}: give a fraction for it, {self.axis}=0.5; the scores say which axes there are"
            )


@Parameter(name="*")
@dataclass(frozen=True)
class Files:
    """The files to read, and the plan to write."""

    scores: Annotated[Path, Parameter(metavar="FILE", group=REMOVE)] = Path("scores.safetensors")
    """File from `sspruner score`."""

    curves: Annotated[Path | None, Parameter(metavar="FILE", group=AMOUNT)] = None
    """File from `sspruner score --curves`, for --allocation adaptive."""

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
    """Run `sspruner plan`.

    Examples:
        sspruner plan path/to/model --scores scores.safetensors --sparsity 0.75
        sspruner plan path/to/model --axis state=0.5,head=0.25 --ignore 'layers.0.*'
    """
    from sspruner.budgets.resolve import check_values
    from sspruner.files.output import check_file
    from sspruner.formats.targets import chosen

    if remove.axis is not None and (budget.sparsity is not None or budget.keep is not None):
        raise InputError("give fractions by axis or one sparsity or keep for all, not both")
    recipe = Recipe(
        remove=Remove(ignore=remove.ignore) if remove.axis is None else replace(remove),
        elements=elements,
        budget=budget,
        target=target,
    )
    check_values(recipe)
    check_file(files.out)

    import sspruner
    from sspruner.axes import axis_of
    from sspruner.benchmarking.engine_limit import layer_notes
    from sspruner.formats.fitting import check_cut
    from sspruner.plans.plan import check_plan

    runtime = chosen(target.runtime, target.tp)
    prepare(reading.plugin, model)
    loaded, _ = sspruner.load(model, **reading.arguments)
    graph = sspruner.trace(loaded)
    scores = sspruner.Scores.load(files.scores)
    for line in layer_notes(loaded, graph, map(axis_of, scores.importance), recipe):
        warn(line)
    measured = sspruner.Sensitivity.load(files.curves) if files.curves else None
    if measured:
        measured.check(scores)
    plan = sspruner.plan(graph, scores, recipe, curves=measured.curves if measured else None)
    check_plan(plan, graph, sspruner.fingerprint(loaded))
    if runtime:
        check_cut(loaded, plan, graph, runtime)
    plan.save(files.out)
    if changes := scores.metadata.get("changes_weights"):
        warn(f"{changes} changes weights, too: only `sspruner prune` does that; this plan selects")
    for line in plan.made_by["target"]["rounded"] if runtime else ():
        say(f"rounded for {runtime}: {line}")
    say(f"{plan}\nin {files.out}")


app = command_app(NAME, command)
