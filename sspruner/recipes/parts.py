"""The parts of recipes. Each field is an option of the command line, and a key in a YAML file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from sspruner.errors import InputError
from sspruner.recipes.texts import fractions_by_name, names_by_axis, units_by_pattern, values_by_name
from sspruner.units import parse_bytes, parse_increase, parse_parameters

if TYPE_CHECKING:
    Quantity = float | None
else:  # a text such as 25MB is read when the part is made: after that it is a number
    Quantity = float | str | None

REPEATED = Parameter(negative=(), consume_multiple=False)


@Parameter(name="*", group="What to remove")
@dataclass(frozen=True)
class Remove:
    """What to remove, and what to leave alone.

    A pattern is matched against a dependency group's name, its path, or the end of either from a dot on:
    `layers.0.*`, `*.mixer:head`. On the axes `block` and `mixer` it is matched against the modules, too.
    """

    axis: str | Mapping[str, float] = "state"
    """Axis to prune; several with the fraction of each: state=0.5,head=0.25."""

    ignore: Annotated[tuple[str, ...], REPEATED] = ()
    """Pattern of layers to leave alone, e.g. 'layers.0.*'. Repeatable."""

    def __post_init__(self) -> None:
        """Read `state=0.5,head=0.25` as a mapping."""
        if isinstance(self.axis, str):
            object.__setattr__(self, "axis", fractions_by_name(self.axis, "axis"))
        object.__setattr__(self, "ignore", tuple(self.ignore))

    @property
    def axes(self) -> list[str]:
        """The axes that are pruned."""
        return [self.axis] if isinstance(self.axis, str) else list(self.axis)


@Parameter(name="*", group="What to remove")
@dataclass(frozen=True)
class Elements:
    """On the axes of single elements (weight, decay): which elements compete."""

    pattern: str | None = None
    """Single elements: keep N of every M of a row, e.g. 2:4."""

    granularity: str | None = None
    """Single elements: which compete: row, tensor or global. Default: the scorer's own."""

    rows: Annotated[tuple[str, ...], REPEATED] = ()
    """Single elements: prune only these named runs of rows, e.g. B. Repeatable."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))


@Parameter(name="*", group="How much")
@dataclass(frozen=True)
class Allocation:
    """How the budget is shared between layers."""

    allocation: str = "uniform"
    """uniform: the same fraction of every layer. global: layers compete by their scores. adaptive: the best split by
    measured damage. uniform-best: the smallest one size within --max-ppl-increase or --max-kl."""

    normalise: str | None = None
    """How --allocation global makes scores of layers comparable: energy, last or none. Default: the scorer's own."""

    multiple_of: int = 1
    """Keep a multiple of this many units (torch-pruning: round_to)."""

    ratios: Annotated[Mapping[str, float], Parameter(name="--ratio")] = field(default_factory=dict)
    """PATTERN=FRACTION: remove another fraction from the layers that match; later ones win. Repeatable."""

    floor: Mapping[str, int] = field(default_factory=dict)
    """UNITS, or PATTERN=UNITS: keep at least this many units in every set, whatever the budget. Repeatable."""

    cap: Mapping[str, int] = field(default_factory=dict)
    """UNITS, or PATTERN=UNITS: keep at most this many units in every set. Repeatable."""

    def __post_init__(self) -> None:
        """Read texts such as `layers.0.*=0.25` as mappings."""
        object.__setattr__(self, "ratios", fractions_by_name(self.ratios or {}, "ratio"))
        object.__setattr__(self, "floor", units_by_pattern(self.floor or {}, "floor"))
        object.__setattr__(self, "cap", units_by_pattern(self.cap or {}, "cap"))


@Parameter(name="*", group="How much")
@dataclass(frozen=True)
class Budget(Allocation):
    """How much to remove: a fraction of the units, or a number of units that stay."""

    sparsity: float | None = None
    """Fraction of units to remove, in [0, 1). Default: 0.5, unless --keep or a limit says how much."""

    keep: int | None = None
    """Units to keep in every group, instead of --sparsity."""


@Parameter(name="*", group="How much")
@dataclass(frozen=True)
class Limits:
    """Limits on the size of the pruned model and on the damage, instead of a fraction. `None` means no limit.

    The key/value caches of hybrids grow with the text and are not part of `memory`. Damage is measured on calibration
    text. Raises InputError for a limit that is not a number above 0.
    """

    state_bytes: Quantity = None
    """Instead of a fraction: recurrent state per sequence, at most, e.g. 25MB."""

    max_batch: int | None = None
    """Instead of a fraction: this many sequences and the weights fit in --memory."""

    memory: Quantity = None
    """Memory for --max-batch, e.g. 80GB: weights, and recurrent and convolution states."""

    parameters: Annotated[Quantity, Parameter(name="--params")] = None
    """Instead of a fraction: parameters, at most: 0.8x of the model's, or e.g. 900M."""

    perplexity_increase: Annotated[Quantity, Parameter(name="--max-ppl-increase")] = None
    """Instead of a fraction: the largest cut that raises perplexity by at most this, e.g. 1%."""

    kl: Annotated[float | None, Parameter(name="--max-kl")] = None
    """Instead of a fraction: the largest cut within this KL to the dense model, in nats per token."""

    def __post_init__(self) -> None:
        """Read texts such as 25MB and 1% as numbers."""
        for name, read in _LIMIT_TEXTS.items():
            if isinstance(text := getattr(self, name), str):
                object.__setattr__(self, name, read[0](text, read[1]))
        if (self.max_batch is None) != (self.memory is None):
            raise InputError("max-batch and memory go together: how many sequences, in how many bytes")
        for name, value in self.to_json().items():
            if not (value > 0 and math.isfinite(value)):
                raise InputError(f"{name.replace('_', '-')} {value}: must be a number above 0")

    def __bool__(self) -> bool:
        """Whether anything is limited."""
        return bool(self.to_json())

    @property
    def of_size(self) -> bool:
        """Whether the size of the pruned model is limited."""
        return any(limit is not None for limit in (self.state_bytes, self.memory, self.parameters))

    @property
    def of_damage(self) -> bool:
        """Whether the damage of the cut is limited."""
        return self.perplexity_increase is not None or self.kl is not None

    def to_json(self) -> dict[str, float]:
        """The limits that are set."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


_LIMIT_TEXTS = {
    "state_bytes": (parse_bytes, "--state-bytes"),
    "memory": (parse_bytes, "--memory"),
    "parameters": (parse_parameters, "--params"),
    "perplexity_increase": (parse_increase, "--max-ppl-increase"),
}


@Parameter(name="*", group="Method")
@dataclass(frozen=True)
class Scoring:
    """How scorers are run."""

    options: Annotated[Mapping[str, Any], Parameter(name="--option")] = field(default_factory=dict)
    """An option of the scorer: name=value, or scorer.name=value. Repeatable."""

    seed: int = 0
    """Seed of sampling, windows and the random scorer."""

    def __post_init__(self) -> None:
        """Read `name=value` as a mapping."""
        object.__setattr__(self, "options", values_by_name(self.options or {}, "option"))


@Parameter(name="*", group="Method")
@dataclass(frozen=True)
class Method(Scoring):
    """Which scorer decides, and how the cut is made."""

    scorer: Any = None
    """Scorer (`sspruner scorers` lists them), or one per axis: state=ghost,mlp=magnitude. auto, or auto:ghost,taylor:
    pick the one with the lowest perplexity on the calibration text. Default: ghost, or that of --basis."""

    basis: str | None = None
    """select: keep coordinates of the state. balanced: keep directions. Default: the scorer's."""

    mode: str = "slice"
    """slice: smaller tensors, proved equal to the mask. mask: zeros, same sizes."""

    one_shot: Annotated[bool, Parameter(negative=())] = False
    """Score all layers on the dense model, then cut at once."""

    refit: str = "none"
    """After the cut, solve for what stays: output (weights of out_proj and its like), bias, or none."""

    def __post_init__(self) -> None:
        """Read `state=ghost,mlp=magnitude` as a mapping."""
        super().__post_init__()
        if isinstance(self.scorer, str):
            object.__setattr__(self, "scorer", names_by_axis(self.scorer, "scorer"))


@Parameter(name="*", group="Calibration")
@dataclass(frozen=True)
class CalibrationText:
    """The text that scorers observe, and on which damage is measured."""

    source: Annotated[str, Parameter(name="--calibration")] = "self"
    """Text file, datasets name (NAME[:CONFIG[:SPLIT]]), or self: sampled from the model."""

    samples: int = 32
    """Calibration sequences."""

    seq_len: int = 256
    """Tokens per calibration sequence."""


@Parameter(name="*", group="Target")
@dataclass(frozen=True)
class Target:
    """The runtime that will serve the pruned model: sizes are rounded to those that it takes."""

    runtime: Annotated[str | None, Parameter(name="--target")] = None
    """Only sizes that this runtime takes: hf, mamba-ssm, vllm, tensorrt-llm or llama.cpp."""

    tp: int = 1
    """GPUs over which vllm or tensorrt-llm splits the model."""
