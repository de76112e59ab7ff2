"""Options of `evaluate` and `bench`: measures, text, and load. They decide nothing about a cut."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from sspruner.errors import InputError
from sspruner.recipes.common import Composed
from sspruner.recipes.flags import FromText, number, read_texts, text, whole
from sspruner.recipes.flags import text as one_text  # where a field is named text
from sspruner.recipes.lists import names_in, numbers_in
from sspruner.recipes.texts import increase_of, seed_in_64_bits, tokens_or_chunk
from sspruner.units import parse_bandwidth, parse_flops

if TYPE_CHECKING:
    Quantity = float | None
    Source = Any
    Every = int | str | None
else:  # texts such as 3.35TB/s are read when the part is made; in Python a text may also be tokens
    Quantity = float | str | None
    Source = str
    Every = int | str | None

WHAT = Group("What to measure", sort_key=1)
TEXT = Group("Text", sort_key=2)
STATE = Group("Stored state", sort_key=3)
GATES = Group("Gates", sort_key=4)
LOAD = Group("Load", sort_key=2)
CEILING = Group("Ceiling", sort_key=3)
ENGINE = Group("Engine", sort_key=4)

ENGINES = ("transformers", "vllm", "llama.cpp")  # that `bench` runs models in

METRICS = ("perplexity", "position", "length", "recall", "passkey")
STATE_DTYPES = ("int8", "fp8", "bf16", "fp16")
ROUNDINGS = ("nearest", "stochastic", "feedback")


@Parameter(name="*", group=WHAT)
@dataclass(frozen=True)
class Measures:
    """The measures to take of a model."""

    metrics: Annotated[
        tuple[str, ...] | None,
        text("NAME,NAME", default="all; with --state-dtype none"),
        FromText(names_in, "--metrics"),
    ] = None
    """Some of perplexity, position, length, recall, passkey, separated by commas; or none."""

    lambada: Annotated[str | None, text("TEXT")] = None
    """LAMBADA: a table with `text`, such as .jsonl, or a datasets name."""

    tasks: Annotated[tuple[str, ...], text("NAME,NAME"), FromText(names_in, "--tasks")] = ()
    """Tasks of lm-eval, separated by commas."""

    include_path: Annotated[Path | None, Parameter(metavar="DIR")] = None
    """Folder with custom lm-eval tasks."""

    limit: Annotated[int | None, whole(default="all")] = None
    """Passages of LAMBADA, and items of each task."""

    seed: Annotated[int, whole(), FromText(seed_in_64_bits, "seed")] = 0
    """Seed of sampling, of drawn items, and of the bootstrap."""

    def __post_init__(self) -> None:
        """Read texts such as `perplexity,recall`, and `none` as no metric."""
        read_texts(self)
        if self.metrics is not None:
            object.__setattr__(self, "metrics", tuple(name for name in self.metrics if name != "none"))
        if self.limit is not None and self.limit < 1:
            raise InputError(f"limit {self.limit}: must be at least 1")
        if wrong := [name for name in self.metrics or () if name not in METRICS]:
            raise InputError(f"metric {wrong[0]!r}: must be one of {', '.join(METRICS)}")


@Parameter(name="*", group=TEXT)
@dataclass(frozen=True)
class TextWindows:
    """The text whose tokens are predicted, and its windows.

    In Python `text` may also be anything else that `sspruner.calibration` takes.
    """

    text: Annotated[Source, one_text("TEXT")] = "self"
    """File, folder or datasets name, or page, as for --calibration, or self: sampled from --against, or from the
    model."""

    text_column: Annotated[str, one_text("NAME", default="text, else messages")] = ""
    """Column of this text in tables and datasets."""

    tokens: Annotated[int, whole()] = 8192
    """Number of tokens to measure, from the start of the text."""

    max_length: Annotated[int, whole()] = 512
    """Tokens in the longest window."""

    stride: Annotated[int | None, whole(default="half of --max-length")] = None
    """Tokens from one window to the next."""

    def __post_init__(self) -> None:
        if self.max_length < 1 or self.tokens < 2:
            raise InputError(f"max-length {self.max_length}, tokens {self.tokens}: must be at least 1 and 2")
        if not 1 <= self.step <= self.max_length:
            raise InputError(f"stride {self.step}: must be at least 1 and at most the window, {self.max_length}")

    @property
    def step(self) -> int:
        """Return the stride; default: half of max_length."""
        return max(1, self.max_length // 2) if self.stride is None else self.stride


@Parameter(name="*", group=STATE)
@dataclass(frozen=True)
class StoredState:
    """How recurrent states are stored while a text is decoded."""

    state_dtype: Annotated[str | None, text("DTYPE", default="not measured")] = None
    """Also decode the text with recurrent states in int8, fp8, bf16 or fp16, beside fp32."""

    rounding: Annotated[str | None, text("NAME", default="nearest")] = None
    """nearest, stochastic, or feedback: what one rounding leaves over, the next one adds."""

    every: Annotated[Every, text("N", default="1"), FromText(tokens_or_chunk, "--every")] = None
    """Tokens from one store to the next; or chunk: those of a chunk of the model's scan."""

    def __post_init__(self) -> None:
        """Read `16`, and give the two others their defaults if a dtype is given."""
        read_texts(self)
        if self.state_dtype is None:
            for name in ("rounding", "every"):
                if getattr(self, name) is not None:
                    raise InputError(f"{name} {getattr(self, name)}: says how a state is stored; give --state-dtype")
            return
        object.__setattr__(self, "rounding", "nearest" if self.rounding is None else self.rounding)
        object.__setattr__(self, "every", 1 if self.every is None else self.every)
        known = {"state_dtype": ("state-dtype", STATE_DTYPES), "rounding": ("rounding", ROUNDINGS)}
        for name, (option, names) in known.items():
            if getattr(self, name) not in names:
                raise InputError(f"{option} {getattr(self, name)!r}: must be one of {', '.join(names)}")


@Parameter(name="*")
@dataclass(frozen=True)
class EvaluateOptions(Composed):
    """Options of `evaluate`, its measures and text: `EvaluateOptions.of(metrics=["recall"], max_length=256)`."""

    measures: Measures = field(default_factory=Measures)
    windows: TextWindows = field(default_factory=TextWindows)
    state: StoredState = field(default_factory=StoredState)

    def __post_init__(self) -> None:
        """Check that there is something to measure."""
        measured = self.chosen or self.state.state_dtype or self.measures.tasks or self.measures.lambada is not None
        if not measured:
            raise InputError(f"nothing to measure: name metrics ({', '.join(METRICS)}), lambada, tasks or state-dtype")

    @property
    def chosen(self) -> tuple[str, ...]:
        """Return the metrics to measure: those that are named, else all; with a stored state none."""
        if self.measures.metrics is not None:
            return self.measures.metrics
        return () if self.state.state_dtype else METRICS


@Parameter(name="*", group=GATES)
@dataclass(frozen=True)
class Gates:
    """Limits on the increase of damage over the dense model; beyond them the exit code is 1."""

    max_ppl_increase: Annotated[Quantity, text("PERCENT"), FromText(increase_of, "--max-ppl-increase")] = None
    """Exit code 1 if perplexity rises by more over --against, e.g. 2%."""

    max_lambada_drop: Annotated[float | None, number("POINTS")] = None
    """Exit code 1 if LAMBADA's accuracy drops by more percentage points, e.g. 1."""

    def __post_init__(self) -> None:
        """Read `2%` as a fraction."""
        read_texts(self)


@Parameter(name="*", group=LOAD)
@dataclass(frozen=True)
class Load:
    """Batch sizes, lengths of sequences, and number of repeats."""

    batches: Annotated[
        tuple[int, ...], text("N,N", name="--batch", default="1,16,64,256"), FromText(numbers_in, "--batch")
    ] = (1, 16, 64, 256)
    """Batch sizes for decoding, separated by commas."""

    prompt: Annotated[int, whole()] = 512
    """Tokens in a prompt."""

    generate: Annotated[int, whole()] = 64
    """Decode steps."""

    repeats: Annotated[int, whole()] = 7
    """Number of measurements; the models take turns."""

    seed: Annotated[int, whole(), FromText(seed_in_64_bits, "seed")] = 0
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
    """Variants of the decode step to measure."""

    accelerate: bool = False
    """Also measure each model with sspruner.accelerate (on the CPU)."""

    cuda_graph: bool = False
    """Replay the decode step as a CUDA graph."""

    profile: bool = False
    """Show where the time of a decode step goes, by operation."""


def _bandwidth(value: Any, option: str) -> Any:
    return parse_bandwidth(value, option) if isinstance(value, str) else value


def _flops(value: Any, option: str) -> Any:
    return parse_flops(value, option) if isinstance(value, str) else value


@Parameter(name="*", group=CEILING)
@dataclass(frozen=True)
class Ceiling:
    """Rates of the machine, which set the ceiling; measured if not given."""

    bandwidth: Annotated[Quantity, text("RATE", default="measured"), FromText(_bandwidth, "--bandwidth")] = None
    """Memory bandwidth for the ceiling, e.g. 3.35TB/s."""

    flops: Annotated[Quantity, text("RATE", default="measured"), FromText(_flops, "--flops")] = None
    """Operations per second for the ceiling, e.g. 989TFLOP/s."""

    def __post_init__(self) -> None:
        """Read texts such as `3.35TB/s`."""
        read_texts(self)


@Parameter(name="*", group=ENGINE)
@dataclass(frozen=True)
class Runner:
    """What runs the models: transformers here, or an engine in a process of its own environment."""

    engine: Annotated[str, one_text("NAME")] = "transformers"
    """transformers, vllm or llama.cpp. The latter two run models that are exported to a temporary folder."""

    python: Annotated[Path | None, Parameter(metavar="FILE", show_default="this one")] = None
    """Python interpreter of the engine's environment, e.g. path/to/venv/bin/python."""

    wait: Annotated[float, number("SECONDS")] = 600.0
    """Seconds that the engine may take to load the models, and for each measurement."""

    def __post_init__(self) -> None:
        """Raise InputError for an unknown engine, and options that transformers does not have."""
        if self.engine not in ENGINES:
            raise InputError(f"engine {self.engine!r}: must be one of {', '.join(ENGINES)}")
        if self.python is not None and self.engine == "transformers":
            raise InputError("python: transformers runs in this process; name an --engine as well")
        if not 0 < self.wait < float("inf"):
            raise InputError(f"wait {self.wait:g}: must be a number of seconds above 0")


@Parameter(name="*")
@dataclass(frozen=True)
class BenchOptions(Composed):
    """Options of `bench`: `BenchOptions.of(batches=(1, 16), prompt=128)`."""

    load: Load = field(default_factory=Load)
    variants: Variants = field(default_factory=Variants)
    ceiling: Ceiling = field(default_factory=Ceiling)
    runner: Runner = field(default_factory=Runner)

    def __post_init__(self) -> None:
        """Raise InputError for variants that the engine does not have."""
        engine = self.runner.engine
        for name in ("accelerate", "profile"):
            if engine != "transformers" and getattr(self.variants, name):
                raise InputError(f"{name}: is of the engine transformers, not of {engine}")
        if engine == "llama.cpp" and self.variants.cuda_graph:
            raise InputError("cuda_graph: bench runs llama.cpp on the processor")
