"""`sspruner apply`: cut a model by a plan, prove the cut, save the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sspruner.cli.console import prepare, reports_errors, say
from sspruner.cli.help import command_app
from sspruner.cli.machine import Folder, Model, ReadingText
from sspruner.recipes.flags import METHOD, REMOVE
from sspruner.recipes.parts import Mode

NAME = "apply"


@Parameter(name="*", group=REMOVE)
@dataclass(frozen=True)
class PlanFile:
    """The plan to apply."""

    plan: Annotated[Path, Parameter(metavar="FILE")] = Path("plan.json")
    """File from `sspruner plan`."""


@reports_errors
def command(
    model: Model = None,
    /,
    *,
    folder: Folder,
    file: PlanFile = PlanFile(),
    how: Annotated[Mode, Parameter(group=METHOD)] = Mode(),
    reading: ReadingText = ReadingText(),
) -> None:
    """Run `sspruner apply`.

    Examples:
        sspruner apply path/to/model --plan plan.json --out smaller
        sspruner apply path/to/model --mode mask --out masked --overwrite
    """
    from sspruner.files.output import check_output

    check_output(folder.out, folder.overwrite)

    import sspruner
    from sspruner.io.save import loading

    plan = sspruner.Plan.load(file.plan)
    prepare(reading.plugin, model)
    loaded, tokenizer = sspruner.load(model, **reading.arguments)
    sspruner.apply(loaded, plan, mode=how.mode)
    sspruner.save(loaded, folder.out, tokenizer, overwrite=folder.overwrite)
    say(f"{plan}\napplied ({how.mode}), saved to {folder.out}\n{loading(loaded, folder.out)}")


app = command_app(NAME, command)
