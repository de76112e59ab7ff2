"""`sspruner push`: put the folder of a model on the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sspruner.cli.console import prepare, reports_errors, say
from sspruner.cli.help import command_app
from sspruner.cli.machine import MODEL, OUTPUT
from sspruner.recipes.flags import text

NAME = "push"


@Parameter(name="*", group=OUTPUT)
@dataclass(frozen=True)
class Repository:
    """The repository on the hub."""

    private: bool = False
    """Make it visible to its owner alone, if it is made."""

    message: Annotated[str, text("TEXT", default="Upload a model pruned with sspruner")] = ""
    """Message of the commit."""


@reports_errors
def command(
    folder: Annotated[Path, Parameter(group=MODEL, help="Folder that prune, export or train wrote.")],
    repository: Annotated[str, Parameter(group=MODEL, help="Repository on the hub: owner/name.")],
    /,
    *,
    how: Repository = Repository(),
) -> None:
    """Run `sspruner push`.

    Examples:
        sspruner push smaller owner/name
        sspruner push for-llama owner/name-gguf --private
    """
    import sspruner

    prepare(None)
    address = sspruner.push_to_hub(folder, repository, private=how.private, message=how.message)
    say(f"{folder} is at {address}")


app = command_app(NAME, command)
