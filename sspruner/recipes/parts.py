"""Parts of recipes. Each field is an option of the command line, and a key in a YAML file."""

# No `from __future__ import annotations`: classes of other modules inherit these fields, and annotations that are text
# would be looked up there.
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from sspruner.errors import InputError
from sspruner.recipes.flags import (
    AMOUNT,
    CALIBRATION,
    METHOD,
    REMOVE,
    TARGET,
    FromText,
    number,
    read_texts,
    text,
    texts,
    whole,
)
from sspruner.recipes.texts import (
    bytes_of,
    fractions_by_axis,
    fractions_by_pattern,
    increase_of,
    names_by_axis,
    parameters_of,
    pattern_of,
    seed_in_64_bits,
    several,
    units_by_pattern,
    values_by_name,
)

if TYPE_CHECKING:
    Quantity = float | None
else:  # a text such as 25MB is read when the part is built: after that it is a number
    Quantity = float | str | None


MODES = ("slice", "mask")
REFITS = ("none", "bias", "output", "reconstruct")


def check_mode(mode: str) -> None:
    """Raise InputError for an unknown mode of a cut."""
    if mode not in MODES:
        raise InputError(f"mode {mode!r}: must be {' or '.join(MODES)}")


def check_size(samples: int, seq_len: int, held_out: int = 0) -> None:
    """Raise InputError for no sequences, or sequences in which nothing is predicted."""
    if samples < 1 or seq_len < 2 or held_out < 0:
        raise InputError(f"samples={samples}, seq_len={seq_len}, held_out={held_out}: need at least 1, 2 and 0")


@Parameter(name="*", group=REMOVE)
@dataclass(frozen=True)
class Remove:
    """What to remove, and which layers to skip.

    A pattern is matched against a dependency group's name, its path, or the end of either from a dot on:
    `layers.0.*`, `*.mixer:head`. On the axes `block` and `mixer` it is matched against the modules, too.
    """

    axis: Annotated[str | Mapping[str, float], text("AXIS"), FromText(fractions_by_axis, "--axis")] = "state"
    """Axis to prune; several with the fraction of each: state=0.5,head=0.25."""

    ignore: Annotated[tuple[str, ...], texts("PATTERN"), FromText(several, "--ignore")] = ()
    """Pattern of layers to skip, e.g. 'layers.0.*'. Repeatable."""

    def __post_init__(self) -> None:
        """Read `state=0.5,head=0.25` as a mapping."""
        read_texts(self)

    @property
    def axes(self) -> list[str]:
        """Return the axes to prune."""
        return [self.axis] if isinstance(self.axis, str) else list(self.axis)


@Parameter(name="*", group=REMOVE)
@dataclass(frozen=True)
class Elements:
    """Which elements compete, on the axes of single elements (weight, decay)."""

    pattern: Annotated[str | None, text("N:M"), FromText(pattern_of, "--pattern")] = None
    """Single elements: keep N of every M of a row, e.g. 2:4."""

    granularity: Annotated[str | None, text("NAME", default="the scorer's own")] = None
    """Single elements: compete within: row, tensor or global."""

    rows: Annotated[tuple[str, ...], texts("NAME"), FromText(several, "--rows")] = ()
    """Single elements: prune only these named row blocks, e.g. B. Repeatable."""

    def __post_init__(self) -> None:
        """Read one name as a tuple of one."""
        read_texts(self)


@Parameter(name="*", group=AMOUNT)
@dataclass(frozen=True)
class Allocation:
    """How the budget is split between layers."""

    allocation: Annotated[str, text("NAME")] = "uniform"
    """uniform: the same fraction of every layer. global: layers compete by their scores. adaptive: the best split by
    measured damage. uniform-best: the smallest one size within --max-ppl-increase or --max-kl."""

    normalise: Annotated[str | None, text("NAME", default="the scorer's own")] = None
    """How --allocation global makes scores of layers comparable: energy, last or none."""

    multiple_of: Annotated[int, whole()] = 1
    """Keep a multiple of this many units (torch-pruning: round_to)."""

    ratios: Annotated[
        Mapping[str, float], texts("PATTERN=FRACTION", name="--ratio"), FromText(fractions_by_pattern, "--ratio")
    ] = field(default_factory=dict)
    """Remove another fraction from matching layers; later ones win. Repeatable."""

    floor: Annotated[Mapping[str, int], texts("[PATTERN=]UNITS"), FromText(units_by_pattern, "--floor")] = field(
        default_factory=dict
    )
    """Keep at least this many units in every set, or in matching ones, whatever the budget. Repeatable."""

    cap: Annotated[Mapping[str, int], texts("[PATTERN=]UNITS"), FromText(units_by_pattern, "--cap")] = field(
        default_factory=dict
    )
    """Keep at most this many units in every set, or in matching ones. Repeatable."""

    def __post_init__(self) -> None:
        """Read texts such as `layers.0.*=0.25` as mappings."""
        read_texts(self)


@Parameter(name="*", group=AMOUNT)
@dataclass(frozen=True)
class Budget(Allocation):
    """How much to remove: a fraction of the units, or a number of units to keep."""

    sparsity: Annotated[float | None, number("FRACTION", default="0.5, unless --keep or a limit says how much")] = None
    """Fraction of units to remove, in [0, 1)."""

    keep: Annotated[int | None, whole()] = None
    """Units to keep in every group, instead of --sparsity."""


@Parameter(name="*", group=AMOUNT)
@dataclass(frozen=True)
class Limits:
    """Limits on the size of the pruned model and on the damage, instead of a fraction. `None` means no limit.

    The key/value caches of hybrids grow with the text and are not part of `memory`, unless the target is an engine
    whose own count decides (sspruner/benchmarking/engine_limit.py). Damage is measured on calibration
    text. Raises InputError for a limit that is not a number above 0.
    """

    state_bytes: Annotated[Quantity, text("BYTES"), FromText(bytes_of, "--state-bytes")] = None
    """Instead of a fraction: maximum recurrent state per sequence, e.g. 25MB."""

    max_batch: Annotated[int | None, whole()] = None
    """Instead of a fraction: fit this many sequences in --memory, with the weights, or in --state-memory; with
    --target vllm or llama.cpp by the engine's own count."""

    memory: Annotated[Quantity, text("BYTES"), FromText(bytes_of, "--memory")] = None
    """Memory for --max-batch, e.g. 80GB: weights, and recurrent and convolution states."""

    state_memory: Annotated[Quantity, text("BYTES"), FromText(bytes_of, "--state-memory")] = None
    """Memory for --max-batch, e.g. 2GB, of recurrent and convolution states alone."""

    parameters: Annotated[Quantity, text("COUNT", name="--params"), FromText(parameters_of, "--params")] = None
    """Instead of a fraction: maximum number of parameters: 0.8x of the model's, or e.g. 900M."""

    perplexity_increase: Annotated[
        Quantity, text("PERCENT", name="--max-ppl-increase"), FromText(increase_of, "--max-ppl-increase")
    ] = None
    """Instead of a fraction: the largest cut that raises perplexity by at most this, e.g. 1%."""

    kl: Annotated[float | None, number(name="--max-kl")] = None
    """Instead of a fraction: the largest cut within this KL to the dense model, in nats per token."""

    def __post_init__(self) -> None:
        """Read texts such as 25MB and 1% as numbers."""
        read_texts(self)
        if (self.max_batch is None) != (self.memory is None and self.state_memory is None):
            raise InputError(
                "max-batch and memory go together, or max-batch and state-memory: how many sequences, in how many bytes"
            )
        for name, value in self.to_json().items():
            if not (value > 0 and math.isfinite(value)):
                raise InputError(f"{name.replace('_', '-')} {value}: must be a number above 0")

    def __bool__(self) -> bool:
        """Check whether any limit is set."""
        return bool(self.to_json())

    @property
    def of_size(self) -> bool:
        """Check whether the size of the pruned model is limited."""
        return any(limit is not None for limit in (self.state_bytes, self.memory, self.state_memory, self.parameters))

    @property
    def of_damage(self) -> bool:
        """Check whether the damage of the cut is limited."""
        return self.perplexity_increase is not None or self.kl is not None

    def to_json(self) -> dict[str, float]:
        """Return the limits that are set."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@Parameter(name="*", group=METHOD)
@dataclass(frozen=True)
class Scoring:
    """Options and seed of scorers."""

    options: Annotated[
        Mapping[str, Any], texts("NAME=VALUE", name="--option"), FromText(values_by_name, "--option")
    ] = field(default_factory=dict)
    """Option of the scorer; scorer.name=value for one of several scorers. Repeatable."""

    seed: Annotated[int, whole(), FromText(seed_in_64_bits, "seed")] = 0
    """Seed of sampling, windows and the random scorer."""

    def __post_init__(self) -> None:
        """Read texts such as `name=value` as mappings."""
        read_texts(self)


@Parameter(name="*", group=METHOD)
@dataclass(frozen=True)
class Mode:
    """How the cut is made."""

    mode: Annotated[str, text("NAME")] = "slice"
    """slice: smaller tensors, proved equal to the mask. mask: zeros, same sizes."""

    def __post_init__(self) -> None:
        """Raise InputError for an unknown mode."""
        check_mode(self.mode)


@Parameter(name="*", group=METHOD)
@dataclass(frozen=True)
class Refitting:
    """Whether what stays gets new values."""

    refit: Annotated[str, text("NAME")] = "none"
    """New values for what stays after the cut: output (out_proj and other output projections) and bias are solved for,
    reconstruct trains what stays of each cut layer to put out what the dense layer does; or none."""

    def __post_init__(self) -> None:
        """Raise InputError for an unknown refit."""
        if self.refit not in REFITS:
            raise InputError(f"refit {self.refit!r}: must be one of {', '.join(REFITS)}")


@Parameter(name="*", group=METHOD)
@dataclass(frozen=True)
class Method(Refitting, Mode, Scoring):
    """The scorer, and how the cut is made."""

    scorer: Annotated[Any, text("NAME", default="ghost, or that of --basis"), FromText(names_by_axis, "--scorer")] = (
        None
    )
    """Scorer (`sspruner scorers` lists them), or one per axis: state=ghost,mlp=magnitude. auto, or auto:ghost,taylor:
    pick the one with the lowest perplexity on the calibration text."""

    basis: Annotated[str | None, text("NAME", default="the scorer's")] = None
    """select: keep coordinates of the state. balanced: keep directions."""

    one_shot: bool = False
    """Score all layers on the dense model, then cut at once."""

    def __post_init__(self) -> None:
        """Read texts, and raise InputError for an unknown mode or refit."""
        Scoring.__post_init__(self)
        Mode.__post_init__(self)
        Refitting.__post_init__(self)


@Parameter(name="*", group=METHOD)
@dataclass(frozen=True)
class Reconstruction:
    """How long --refit reconstruct trains, and on how much text."""

    refit_steps: Annotated[int, whole()] = 400
    """--refit reconstruct: steps for each layer, of one calibration sequence each."""

    refit_windows: Annotated[int, whole()] = 128
    """--refit reconstruct: calibration sequences to train on, the first --samples of which are scored on. An eighth is
    held out."""

    refit_minutes: Annotated[float | None, number()] = None
    """--refit reconstruct: the most minutes to train, shared by the layers that are cut."""

    def __post_init__(self) -> None:
        """Raise InputError for no steps, for fewer windows than can be held out, and for no time."""
        if self.refit_steps < 1 or self.refit_windows < 2:
            raise InputError(
                f"refit-steps {self.refit_steps}, refit-windows {self.refit_windows}: need at least 1 and 2"
            )
        if self.refit_minutes is not None and not (self.refit_minutes > 0 and math.isfinite(self.refit_minutes)):
            raise InputError(f"refit-minutes {self.refit_minutes}: must be a number above 0")


@Parameter(name="*", group=CALIBRATION)
@dataclass(frozen=True)
class CalibrationText:
    """The text for scoring, and for measuring damage during the search."""

    source: Annotated[str, text("TEXT", name="--calibration")] = "self"
    """File (.txt, .jsonl, .json, .csv, .tsv, .parquet, .arrow; .gz), folder of such, datasets name
    (NAME[:CONFIG[:SPLIT]]), page: two chapters of a novel that ship with the package, or self: sampled from the
    model."""

    samples: Annotated[int, whole()] = 32
    """Calibration sequences."""

    seq_len: Annotated[int, whole()] = 256
    """Tokens per calibration sequence."""

    text_column: Annotated[str, text("NAME", default="text, else messages")] = ""
    """Column of the calibration text in tables and datasets."""

    def __post_init__(self) -> None:
        """Raise InputError for no sequences, or sequences in which nothing is predicted."""
        check_size(self.samples, self.seq_len)


@Parameter(name="*", group=TARGET)
@dataclass(frozen=True)
class Target:
    """The runtime that will serve the pruned model; sizes are rounded to those it supports."""

    runtime: Annotated[str | None, text("NAME", name="--target")] = None
    """Only sizes that this runtime supports: hf, mamba-ssm, vllm, tensorrt-llm or llama.cpp, or a backend: vllm:cpu."""

    tp: Annotated[int, whole()] = 1
    """GPUs over which vllm or tensorrt-llm splits the model."""
