"""Recipes of the training methods: DistilRecipe, GradualRecipe, TwistRecipe, and the settings that all share."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from cyclopts import Group, Parameter

from sspruner.errors import InputError
from sspruner.recipes.common import Recorded
from sspruner.recipes.flags import METHOD, FromText, number, read_texts, text, texts, whole
from sspruner.recipes.flags import text as one_text  # where a field is named text
from sspruner.recipes.lists import names_in
from sspruner.recipes.texts import seed_in_64_bits, several

TEXT = Group("Text", sort_key=1)
TRAINING = Group("Training", sort_key=4)


@Parameter(name="*", group=TEXT)
@dataclass(frozen=True)
class TrainText:
    """The text to train on."""

    text: Annotated[tuple[str, ...], texts("TEXT"), FromText(several, "--text")] = ()
    """Text to train on: a file (.txt, .jsonl, .json, .csv, .tsv, .parquet, .arrow; .gz), folder of such, or datasets
    name (NAME[:CONFIG[:SPLIT]]). Repeatable: blocks of all in equal parts."""

    held_out: Annotated[int, whole()] = 16
    """Blocks at the beginning of each text that are never trained on."""

    text_column: Annotated[str, one_text("NAME", default="text, else messages")] = ""
    """Column of the training text in tables and datasets."""

    def __post_init__(self) -> None:
        """Read one text as a tuple of one. Raises InputError if nothing is held out."""
        read_texts(self)
        if self.held_out < 1:
            raise InputError(f"held_out {self.held_out}: must be at least 1: what a run reports is measured there")


@Parameter(name="*", group=TEXT)
@dataclass(frozen=True)
class GradualText(TrainText):
    """The text or the examples to train on."""

    examples: Annotated[str | None, one_text("FILE")] = None
    """Train on examples instead, for a model that is no language model: an .npz file with the arrays that its forward
    takes; each example counts as one token."""


@Parameter(name="*", group=TRAINING)
@dataclass(frozen=True)
class Optimisation:
    """Length of the training, batches, and learning rate, which falls along a cosine to a tenth."""

    max_tokens: Annotated[int, whole()] = 1_000_000
    """Tokens to train on; the learning rate falls over them."""

    max_minutes: Annotated[float | None, number()] = None
    """Stop after this many minutes, and keep the result so far."""

    batch: Annotated[int, whole()] = 16
    """Sequences per step, over all processes."""

    at_once: Annotated[int, whole()] = 8
    """Micro-batch size per process."""

    seq_len: Annotated[int, whole()] = 256
    """Tokens per sequence."""

    learning_rate: Annotated[float, number()] = 1e-4
    """Maximum learning rate."""

    warm_up: Annotated[float, number("FRACTION")] = 0.02
    """Fraction of the steps over which the learning rate rises."""

    weight_decay: Annotated[float, number()] = 0.01
    """Weight decay of matrices; vectors have none."""

    clip: Annotated[float, number()] = 1.0
    """Maximum norm of the gradient."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "batch", "at_once", "seq_len"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}: must be at least 1")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} {getattr(self, name)}: must be above 0")

    @property
    def steps(self) -> int:
        """Return the number of batches in max_tokens, rounded up."""
        return max(1, math.ceil(self.max_tokens / (self.batch * self.seq_len)))

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 1: linear up, then a cosine down to a tenth."""
        rise = max(1, round(self.warm_up * self.steps))
        if step <= rise:
            return self.learning_rate * step / rise
        done = (step - rise) / max(1, self.steps - rise)
        return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


@Parameter(name="*", group=TRAINING)
@dataclass(frozen=True)
class Settings(Optimisation):
    """Settings of the training: length, batches and rate, precision, checkpoints and the seed."""

    bf16: bool = False
    """Compute in bf16 (autocast); weights and moments stay in fp32."""

    recompute: bool = False
    """Gradient checkpointing: recompute activations for the gradient, to save memory."""

    every: Annotated[int, whole()] = 100
    """Steps between checkpoints, each with the held-out perplexity."""

    seed: Annotated[int, whole(), FromText(seed_in_64_bits, "seed")] = 0
    """Seed of the order of blocks, and of all random numbers."""

    log_with: Annotated[tuple[str, ...], texts("NAME"), FromText(several, "--log-with")] = ()
    """Also send metrics to a tracker that is installed: tensorboard, wandb, trackio or another of accelerate's.
    Repeatable."""

    def __post_init__(self) -> None:
        """Check the seed, and the settings of the base class."""
        read_texts(self)
        super().__post_init__()
        if self.every < 1:
            raise InputError(f"every {self.every}: must be at least 1")

    def identity(self) -> dict[str, Any]:
        """Return the settings that identify this training, as JSON; a resumed run may change the others."""
        return {name: value for name, value in asdict(self).items() if name not in ("max_minutes", "log_with")}


@Parameter(name="*", group=METHOD)
@dataclass(frozen=True)
class Distillation:
    """The loss of the student."""

    teacher: Annotated[str | None, text("MODEL", default="what MODEL was pruned from, by its report")] = None
    """Dense model: folder or hub id."""

    alpha: Annotated[float, number()] = 0.5
    """Weight of the teacher's part in the loss; the text has the rest."""

    temperature: Annotated[float, number()] = 1.0
    """Temperature of both models' probabilities in the teacher's part."""

    hidden: Annotated[float, number()] = 0.0
    """Weight of the error of hidden states after each block."""

    lora: Annotated[int, whole()] = 0
    """Train low-rank matrices of this rank instead; merged at the end."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1 or self.temperature <= 0 or self.hidden < 0 or self.lora < 0:
            raise InputError(
                f"alpha {self.alpha} (0 to 1), temperature {self.temperature} (above 0), hidden {self.hidden}, "
                f"lora {self.lora}"
            )


@Parameter(name="*", group=METHOD)
@dataclass(frozen=True)
class Gradual:
    """What to remove during training, and when."""

    axis: Annotated[str, text("AXIS")] = "weight"
    """What to remove: weight for single elements, or an axis of units."""

    sparsity: Annotated[float, number("FRACTION")] = 0.5
    """Fraction to remove by the end."""

    alpha: Annotated[float, number()] = 1.0
    """Exponent of the gradient in |w| |g|^alpha; 0: magnitude."""

    mask_every: Annotated[int, whole()] = 10
    """Steps between masks."""

    begin: Annotated[float, number("FRACTION")] = 0.0
    """Fraction of the steps after which removal begins."""

    end: Annotated[float, number("FRACTION")] = 0.7
    """Fraction of the steps after which the whole fraction is removed."""

    allocation: Annotated[str, text("NAME")] = "uniform"
    """Of units: uniform, the same fraction of every layer, or global, one threshold."""

    teacher: Annotated[str | None, text("MODEL", default="the text alone")] = None
    """Also distil from this model: folder or hub id."""

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise InputError(f"alpha {self.alpha}: must be at least 0")
        _check_part("sparsity", self.sparsity)
        if not 0 <= self.begin < self.end <= 1 or self.mask_every < 1:
            raise InputError(
                f"schedule: begins at {self.begin}, ends at {self.end}, every {self.mask_every} steps: expected "
                "0 <= begin < end <= 1, and at least 1"
            )


@Parameter(name="*", group=METHOD)
@dataclass(frozen=True)
class Twist:
    """How random sub-networks are assigned to the workers."""

    axis: Annotated[tuple[str, ...], text("AXIS,AXIS", default="head"), FromText(names_in, "--axis")] = ("head",)
    """Axis of the units that are dealt to the workers; several separated by commas."""

    keep: Annotated[float, number("FRACTION")] = 0.5
    """Fraction of the units in every sub-network."""

    deal_every: Annotated[int, whole()] = 15
    """Steps between rounds: workers are averaged and units dealt again."""

    ends: Annotated[int, whole()] = 2
    """Blocks at each end that are whole in every sub-network."""

    draws: Annotated[int, whole()] = 8
    """Sub-networks drawn at the end; the best is kept."""

    def __post_init__(self) -> None:
        read_texts(self)
        if self.deal_every < 1 or self.draws < 1:
            raise InputError(f"every {self.deal_every}, draws {self.draws}: must be at least 1")
        _check_part("keep", self.keep)
        if self.ends < 0:
            raise InputError(f"ends {self.ends}: must be at least 0")


def _check_part(name: str, value: float) -> None:
    """Raise InputError for a fraction that leaves nothing, or everything."""
    if not 0 < value < 1:
        raise InputError(f"{name} {value}: must be above 0 and below 1")


@Parameter(name="*")
@dataclass(frozen=True)
class DistilRecipe(Recorded):
    """Settings for distilling a pruned model from text and from its dense model; the argument of `distil`.

    `DistilRecipe.of(alpha=0.9, max_tokens=10**6)` makes one from the fields of its parts.
    """

    method: Distillation = field(default_factory=Distillation)
    text: TrainText = field(default_factory=TrainText)
    settings: Settings = field(default_factory=Settings)


@Parameter(name="*")
@dataclass(frozen=True)
class GradualRecipe(Recorded):
    """Settings for pruning a model during training; the argument of `gradual`.

    `GradualRecipe.of(axis="state", sparsity=0.5)` makes one from the fields of its parts.
    """

    method: Gradual = field(default_factory=Gradual)
    text: GradualText = field(default_factory=GradualText)
    settings: Settings = field(default_factory=Settings)


@Parameter(name="*")
@dataclass(frozen=True)
class TwistRecipe(Recorded):
    """Settings for training random sub-networks; the argument of `twist`.

    `TwistRecipe.of(axis="head", keep=0.5)` makes one from the fields of its parts.
    """

    method: Twist = field(default_factory=Twist)
    text: TrainText = field(default_factory=TrainText)
    settings: Settings = field(default_factory=Settings)
