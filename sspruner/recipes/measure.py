"""Options of `evaluate` and `bench`: what is measured, on what, and how. They decide nothing about a cut."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from sspruner.errors import InputError
from sspruner.recipes.common import made_of
from sspruner.recipes.flags import FromText, number, read_texts, text, whole
from sspruner.recipes.flags import text as one_text  # where a field is named text
from sspruner.recipes.lists import names_in, numbers_in
from sspruner.units import parse_bandwidth, parse_flops, parse_increase

if TYPE_CHECKING:
    Quantity = float | None
    Source = Any
else:  # texts such as 3.35TB/s are read when the part is made; in Python a text may also be tokens
    Quantity = float | str | None
    Source = str

WHAT = Group("What to measure", sort_key=1)
TEXT = Group("Text", sort_key=2)
GATES = Group("Gates", sort_key=3)
LOAD = Group("Load", sort_key=2)
CEILING = Group("Ceiling", sort_key=3)


@Parameter(name="*", group=WHAT)
@dataclass(frozen=True)
class Measures:
    """What to measure of a model."""

    metrics: Annotated[tuple[str, ...] | None, text("NAME,NAME", default="all"), FromText(names_in, "--metrics")] = None
    """Some of perplexity, position, length, recall, passkey, separated by commas; or none."""

    lambada: Annotated[str | None, text("TEXT")] = None
    """LAMBADA: a .jsonl with `text`, or a datasets name."""

    tasks: Annotated[tuple[str, ...], text("NAME,NAME"), FromText(names_in, "--tasks")] = ()
    """Tasks of lm-eval, separated by commas."""

    include_path: Annotated[Path | None, Parameter(metavar="DIR")] = None
    """Folder with lm-eval tasks of your own."""

    limit: Annotated[int | None, whole(default="all")] = None
    """Passages of LAMBADA, and items of each task."""

    seed: Annotated[int, whole()] = 0
    """Seed of sampling, of what is drawn, and of the bootstrap."""

    def __post_init__(self) -> None:
        """Read texts such as `perplexity,recall`, and `none` as no metric."""
        read_texts(self)
        if self.metrics is not None:
            object.__setattr__(self, "metrics", tuple(name for name in self.metrics if name != "none"))
        if self.limit is not None and self.limit < 1:
            raise InputError(f"limit {self.limit}: must be at least 1")


@Parameter(name="*", group=TEXT)
@dataclass(frozen=True)
class TextWindows:
    """The text whose tokens are predicted, and the windows in which a model reads it.

    In Python `text` may also be tokens, int64 (texts, T).
    """

    text: Annotated[Source, one_text("TEXT")] = "self"
    """Text file, datasets name, or self: sampled from --against, or from the model."""

    tokens: Annotated[int, whole()] = 8192
    """Tokens of the text that are measured: the first ones."""

    max_length: Annotated[int, whole()] = 512
    """Tokens of the longest window."""

    stride: Annotated[int | None, whole(default="half of --max-length")] = None
    """Tokens from one window to the next."""

    def __post_init__(self) -> None:
        if self.max_length < 1 or self.tokens < 2:
            raise InputError(f"max-length {self.max_length}, tokens {self.tokens}: must be at least 1 and 2")
        if not 1 <= self.step <= self.max_length:
            raise InputError(f"stride {self.step}: must be at least 1 and at most the window, {self.max_length}")

    @property
    def step(self) -> int:
        """The stride; half of max_length where none is given."""
        return max(1, self.max_length // 2) if self.stride is None else self.stride


@Parameter(name="*")
@dataclass(frozen=True)
class EvaluateOptions:
    """What `evaluate` measures, and on which text: `EvaluateOptions.of(metrics=["recall"], max_length=256)`."""

    measures: Measures = field(default_factory=Measures)
    windows: TextWindows = field(default_factory=TextWindows)

    @classmethod
    def of(cls, **short: Any) -> EvaluateOptions:
        """Make options from the fields of their parts. Raises InputError for an unknown one."""
        return made_of(cls, short)


def _increase(given: Any, option: str) -> Any:
    return parse_increase(given, option) if isinstance(given, str) else given


@Parameter(name="*", group=GATES)
@dataclass(frozen=True)
class Gates:
    """How much worse a model may be than the dense one, before the exit code is 1."""

    max_ppl_increase: Annotated[Quantity, text("PERCENT"), FromText(_increase, "--max-ppl-increase")] = None
    """Exit code 1 if perplexity rises by more over --against, e.g. 2%."""

    max_lambada_drop: Annotated[float | None, number("POINTS")] = None
    """Exit code 1 if LAMBADA's accuracy drops by more percentage points, e.g. 1."""

    def __post_init__(self) -> None:
        """Read `2%` as a fraction."""
        read_texts(self)


@Parameter(name="*", group=LOAD)
@dataclass(frozen=True)
class Load:
    """How many sequences are decoded at once, how long they are, and how often everything is measured."""

    batches: Annotated[
        tuple[int, ...], text("N,N", name="--batch", default="1,16,64,256"), FromText(numbers_in, "--batch")
    ] = (1, 16, 64, 256)
    """Sequences that are decoded at once, separated by commas."""

    prompt: Annotated[int, whole()] = 512
    """Tokens of a prompt."""

    generate: Annotated[int, whole()] = 64
    """Decode steps."""

    repeats: Annotated[int, whole()] = 7
    """Times that everything is measured, in turns."""

    seed: Annotated[int, whole()] = 0
    """Seed of the random prompts, of the order, and of random weights."""

    def __post_init__(self) -> None:
        """Read texts such as `1,16`."""
        read_texts(self)
        if not self.batches or min(self.batches) < 1:
            raise InputError(f"batches {list(self.batches)}: at least one, each at least 1")
        for name in ("prompt", "generate", "repeats"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}: must be at least 1")


@Parameter(name="*", group=WHAT)
@dataclass(frozen=True)
class Variants:
    """Which variants of the decode step are measured, and what is shown of it."""

    accelerate: bool = False
    """Measure each model with sspruner.accelerate, too (on the CPU)."""

    cuda_graph: bool = False
    """Replay the decode step as a CUDA graph."""

    profile: bool = False
    """Show where the time of a decode step goes, by operation."""


def _bandwidth(given: Any, option: str) -> Any:
    return parse_bandwidth(given, option) if isinstance(given, str) else given


def _flops(given: Any, option: str) -> Any:
    return parse_flops(given, option) if isinstance(given, str) else given


@Parameter(name="*", group=CEILING)
@dataclass(frozen=True)
class Ceiling:
    """The rates of the machine, from which the ceiling follows; measured where not given."""

    bandwidth: Annotated[Quantity, text("RATE", default="measured"), FromText(_bandwidth, "--bandwidth")] = None
    """Bytes per second that the machine moves, for the ceiling, e.g. 3.35TB/s."""

    flops: Annotated[Quantity, text("RATE", default="measured"), FromText(_flops, "--flops")] = None
    """Operations per second that the machine does, for the ceiling, e.g. 989TFLOP/s."""

    def __post_init__(self) -> None:
        """Read texts such as `3.35TB/s`."""
        read_texts(self)


@Parameter(name="*")
@dataclass(frozen=True)
class BenchOptions:
    """What `bench` measures: `BenchOptions.of(batches=(1, 16), prompt=128)`."""

    load: Load = field(default_factory=Load)
    variants: Variants = field(default_factory=Variants)
    ceiling: Ceiling = field(default_factory=Ceiling)

    @classmethod
    def of(cls, **short: Any) -> BenchOptions:
        """Make options from the fields of their parts. Raises InputError for an unknown one."""
        return made_of(cls, short)
