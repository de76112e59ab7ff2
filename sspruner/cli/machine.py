"""Options that decide nothing about the cut: the model, the machine, and the output."""

# No `from __future__ import annotations`: classes of other modules inherit these fields, and annotations that are text
# would be looked up there.
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter

from sspruner.recipes.flags import FromText, read_texts, text, texts
from sspruner.recipes.texts import known_dtype

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
RunsCode = Annotated[bool, Parameter(help="Run code from the model's folder or repository.")]
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
    """Plugins for this run."""

    plugin: Annotated[tuple[Path, ...], Parameter(metavar="FILE", consume_multiple=False)] = ()
    """Python file with a plugin. Repeatable."""


@Parameter(name="*", group=MACHINE)
@dataclass(frozen=True)
class Trust(Plugins):
    """Permission to run a model's own code."""

    trust_remote_code: RunsCode = False


@Parameter(name="*", group=MACHINE)
@dataclass(frozen=True)
class Timing(Trust):
    """Device and dtype for timing."""

    device: Device = None

    dtype: Annotated[str, text("NAME"), FromText(known_dtype, "--dtype")] = "auto"
    """auto (as saved; for shapes bfloat16 on a GPU, else float32), float32, bfloat16 or float16."""

    def __post_init__(self) -> None:
        """Raise InputError for an unknown dtype."""
        read_texts(self)


@Parameter(name="*", group=MACHINE)
@dataclass(frozen=True)
class Reading(Trust):
    """Settings for loading a model."""

    dtype: Annotated[str, text("NAME"), FromText(known_dtype, "--dtype")] = "auto"
    """auto (as saved), float32, bfloat16 or float16."""

    merge_adapters: bool = False
    """Merge the adapter (peft) in the model's folder into its base model."""

    not_causal: bool = False
    """The model is meant to look ahead (bidirectional)."""

    def __post_init__(self) -> None:
        """Raise InputError for an unknown dtype."""
        read_texts(self)

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `sspruner.load`."""
        names = ("dtype", "merge_adapters", "trust_remote_code")
        return {name: getattr(self, name) for name in names} | {"causal": not self.not_causal}


@Parameter(name="*", group=MACHINE)
@dataclass(frozen=True)
class ReadingText(Reading):
    """Settings for loading a model and its tokenizer."""

    tokenizer: Tokenizer = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `sspruner.load`."""
        return super().arguments | {"tokenizer": self.tokenizer}


@Parameter(name="*", group=MACHINE)
@dataclass(frozen=True)
class Computing(ReadingText):
    """Settings for loading a model, and the device."""

    device: Device = None


@Parameter(name="*", group=MACHINE)
@dataclass(frozen=True)
class Machine(Computing):
    """Settings for loading a model, the device, and the cache of scores."""

    no_cache: bool = False
    """Ignore cached scores, and score again."""


@Parameter(name="*", group=LARGE)
@dataclass(frozen=True)
class Places:
    """Placement of the blocks of a model that does not fit on one device."""

    device_map: Annotated[str | None, text("NAME")] = None
    """auto: place blocks on GPUs, in memory and on disk, as they fit; for prune with --out and a text file."""

    max_memory: Annotated[tuple[str, ...], texts("PLACE=SIZE"), Parameter(show_default="4/5 of what is free")] = ()
    """Limits for --device-map: 0=20GiB, cpu=60GiB. Repeatable."""

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `sspruner.load`."""
        from sspruner.cli.console import sizes_from

        return {"device_map": self.device_map, "max_memory": sizes_from(self.max_memory)}


@Parameter(name="*", group=LARGE)
@dataclass(frozen=True)
class Apart(Places):
    """Settings for pruning a model block by block."""

    offload: bool = False
    """Keep the model on disk and read it block by block; needs --out and a text file."""

    resume: bool = False
    """With --offload or --device-map: continue the same command after an interruption."""


@Parameter(name="*", group=OUTPUT)
@dataclass(frozen=True)
class Json:
    """Output of the result as JSON."""

    json: Annotated[Path | None, Parameter(metavar="FILE", allow_leading_hyphen=True)] = None
    """Write the result as JSON to this file; - for standard output."""

    def check(self) -> None:
        """Raise InputError, before any work, if the file cannot be written."""
        from sspruner.files.output import check_file

        if self.json is not None and not self.only:
            check_file(self.json)

    @property
    def only(self) -> bool:
        """Check whether standard output must hold JSON and nothing else."""
        return str(self.json) == "-"


@Parameter(name="*", group=OUTPUT)
@dataclass(frozen=True)
class Overwrite:
    """Permission to replace an earlier result."""

    overwrite: bool = False
    """Replace an earlier model in --out."""


@Parameter(name="*", group=OUTPUT)
@dataclass(frozen=True, kw_only=True)
class Folder(Overwrite):
    """The folder to write the model to."""

    out: Annotated[Path, ModelFolder]


@Parameter(name="*", group=OUTPUT)
@dataclass(frozen=True)
class Output(Overwrite, Json):
    """Output of the pruned model and its report."""

    out: Annotated[Path | None, ModelFolder] = None
