"""Options that decide nothing about the cut: which model, on which machine, and where results go."""

# No `from __future__ import annotations`: classes of other modules inherit these fields, and annotations that are text
# would be looked up there.
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter

from sspruner.recipes.flags import text, texts

MODEL = Group("Model", sort_key=0)
MACHINE = Group("Machine", sort_key=6)
LARGE = Group("Large models", sort_key=7)
OUTPUT = Group("Output", sort_key=8)

Model = Annotated[str | None, Parameter(group=MODEL, help="Folder or hub id.", show_default="the reference model")]
RecipeFile = Annotated[
    Path | None,
    Parameter(
        name="--recipe", group=MODEL, metavar="FILE", help="YAML file with a recipe; flags that are given override it."
    ),
]
RunsCode = Annotated[bool, Parameter(help="Run code that lies in the model's folder or repository.")]
Tokenizer = Annotated[
    str | None,
    text("NAME", default="that in the model's folder"),
    Parameter(help="Folder or hub id of the tokenizer."),
]
Device = Annotated[
    str | None, text("NAME", default="cuda if there is one, else cpu"), Parameter(help="Compute device.")
]
ModelFolder = Parameter(metavar="DIR", help="Folder to write the model to.")


@Parameter(name="*", group=MACHINE)
@dataclass(frozen=True)
class Plugins:
    """What extends sspruner for this run."""

    plugin: Annotated[tuple[Path, ...], Parameter(metavar="FILE", consume_multiple=False)] = ()
    """Python file with a plugin. Repeatable."""


@Parameter(name="*", group=MACHINE)
@dataclass(frozen=True)
class Trust(Plugins):
    """Whether code of others is run."""

    trust_remote_code: RunsCode = False


@Parameter(name="*", group=MACHINE)
@dataclass(frozen=True)
class Timing(Trust):
    """Where models are timed, and in which dtype."""

    device: Device = None

    dtype: Annotated[str, text("NAME")] = "auto"
    """auto (as saved; of shapes bfloat16 on a GPU, else float32), float32, bfloat16 or float16."""


@Parameter(name="*", group=MACHINE)
@dataclass(frozen=True)
class Reading(Trust):
    """How a model is read."""

    dtype: Annotated[str, text("NAME")] = "auto"
    """auto (as saved), float32, bfloat16 or float16."""

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `sspruner.load`."""
        return {"dtype": self.dtype, "trust_remote_code": self.trust_remote_code}


@Parameter(name="*", group=MACHINE)
@dataclass(frozen=True)
class ReadingText(Reading):
    """How a model and its tokenizer are read."""

    tokenizer: Tokenizer = None

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `sspruner.load`."""
        return super().arguments | {"tokenizer": self.tokenizer}


@Parameter(name="*", group=MACHINE)
@dataclass(frozen=True)
class Computing(ReadingText):
    """How a model is read, and where it is computed."""

    device: Device = None


@Parameter(name="*", group=MACHINE)
@dataclass(frozen=True)
class Machine(Computing):
    """How a model is read, where it is computed, and whether scores are taken from the cache."""

    no_cache: bool = False
    """Score again, even if nothing has changed since."""


@Parameter(name="*", group=LARGE)
@dataclass(frozen=True)
class Places:
    """Where the blocks of a model lie that does not fit on one device."""

    device_map: Annotated[str | None, text("NAME")] = None
    """auto: blocks on GPUs, in memory and on disk, as they fit; with --out and a text file in prune."""

    max_memory: Annotated[tuple[str, ...], texts("PLACE=SIZE"), Parameter(show_default="4/5 of all")] = ()
    """What --device-map may fill: 0=20GiB, cpu=60GiB. Repeatable."""

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `sspruner.load`."""
        from sspruner.cli.console import sizes_from

        return {"device_map": self.device_map, "max_memory": sizes_from(self.max_memory)}


@Parameter(name="*", group=LARGE)
@dataclass(frozen=True)
class Apart(Places):
    """How a model is pruned block by block."""

    offload: bool = False
    """Keep the model on disk and read it block by block; needs --out and a text file."""

    resume: bool = False
    """With --offload or --device-map: go on where the same command was interrupted."""


@Parameter(name="*", group=OUTPUT)
@dataclass(frozen=True)
class Json:
    """The result for programs."""

    json: Annotated[Path | None, Parameter(metavar="FILE", allow_leading_hyphen=True)] = None
    """Write the result as JSON to this file; - for standard output."""

    def check(self) -> None:
        """Raise InputError, before any work, if the file cannot be written."""
        from sspruner.files.output import check_file

        if self.json is not None and not self.only:
            check_file(self.json)

    @property
    def only(self) -> bool:
        """Whether standard output has to hold JSON and nothing else."""
        return str(self.json) == "-"


@Parameter(name="*", group=OUTPUT)
@dataclass(frozen=True)
class Overwrite:
    """Whether an earlier result is replaced."""

    overwrite: bool = False
    """Replace an earlier model in --out."""


@Parameter(name="*", group=OUTPUT)
@dataclass(frozen=True, kw_only=True)
class Folder(Overwrite):
    """The folder of the model that is written."""

    out: Annotated[Path, ModelFolder]


@Parameter(name="*", group=OUTPUT)
@dataclass(frozen=True)
class Output(Overwrite, Json):
    """Where the pruned model and its report go."""

    out: Annotated[Path | None, ModelFolder] = None
