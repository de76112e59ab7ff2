"""What `scorers.py` compares: tables (an axis, its cuts, the models that have it) and their rows, as data.

A row is a scorer with arguments of `sspruner.prune`; a row that cannot be made says why in the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MAMBA2, ZAMBA2, MAMBA1 = MODELS = ("mamba2-books-4m", "zamba2-books", "mamba1-books")


@dataclass(frozen=True)
class Row:
    """label: its name in the table. seeds: how many, unless its table or the command asks for more."""

    label: str
    scorer: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    models: Sequence[str] = MODELS
    seeds: int = 1


@dataclass(frozen=True)
class Table:
    """cuts: column -> arguments of prune. seeds: of every row that is drawn or calibrated.

    against, at: the row and the cut for which ratios of perplexity with their intervals are given.
    """

    axis: str
    models: Sequence[str]
    cuts: Mapping[str, Mapping[str, Any]]
    rows: Sequence[Row]
    against: str
    at: str
    seeds: int = 1


def row(scorer: str, one_shot: bool = False, seeds: int = 1, **options: Any) -> Row:
    """A scorer with its options."""
    label = ", ".join([scorer, *map(str, options.values()), *["one-shot"] * one_shot])
    return Row(label, scorer, {"options": options, "one_shot": one_shot}, seeds=seeds)


RANDOM = row("random", seeds=3)
GENERAL = [RANDOM, row("magnitude"), row("wanda"), row("snip"), row("taylor", seeds=2)]
TORCH_PRUNING = [row(f"tp:{name}") for name in ("magnitude", "lamp", "fpgm", "taylor", "hessian")]

STATE = [
    *GENERAL,
    row("taylor", one_shot=True),
    row("taylor", order="fisher"),
    row("ghost", seeds=2),
    row("ghost", variant="output"),
    Row("balanced", "balanced", models=[MAMBA2, ZAMBA2]),
    row("rrqr"),
    row("last"),
    Row("last, global", "last", {"one_shot": True, "allocation": "global"}),
    Row("sparsessm", "sparsessm", models=[MAMBA1]),
    *TORCH_PRUNING,
    # zeros instead of smaller tensors: GHOST's table calls it optimistic
    Row(
        "sparsegpt on the rows of B and C",
        "sparsegpt",
        {"axis": "weight", "rows": ("B", "C")},
        models=[MAMBA2, ZAMBA2],
    ),
]
HEAD = [
    *GENERAL,
    row("taylor", one_shot=True),
    row("taylor", order="fisher"),
    row("ghost", seeds=2),
    row("ghost", variant="output"),
    row("flap"),
    row("head-merge"),
    row("head-merge", method="kmeans"),
    row("tp:magnitude"),
    row("tp:taylor"),
]
CHANNEL = [r for r in HEAD if r.scorer != "head-merge"]  # and head_dim
MLP = [r for r in CHANNEL if r.scorer != "ghost"]
BLOCK = [RANDOM, row("magnitude"), row("block-influence"), row("perplexity-drop")]
WEIGHT = [
    RANDOM,
    row("magnitude"),
    Row("magnitude, by row", "magnitude", {"granularity": "row"}),
    Row("magnitude, global", "magnitude", {"granularity": "global"}),
    *map(row, ("wanda", "sparsegpt", "snip", "gradmag")),
    Row("gradmag, 0.5", "gradmag", {"options": {"alpha": 0.5}}),
    row("taylor"),
    Row("taylor, global", "taylor", {"granularity": "global"}),
]
DECAY = [RANDOM, *map(row, ("magnitude", "snip", "taylor", "sparsessm"))]

STATES, UNITS, ELEMENTS = (
    {f"{s:.0%}": {"sparsity": s} for s in fractions} for fractions in ((0.5, 0.75, 0.9), (0.25, 0.5), (0.5, 0.75))
)

TABLES = [
    Table("state", MODELS, STATES, STATE, "ghost", "75%"),
    Table("head", [MAMBA2, ZAMBA2], UNITS, HEAD, "ghost", "50%"),
    Table("head_dim", [MAMBA2, ZAMBA2], UNITS, CHANNEL, "ghost", "50%"),
    Table("channel", [MAMBA1], UNITS, CHANNEL, "ghost", "50%"),
    Table("mlp", [ZAMBA2], UNITS, MLP, "flap", "50%"),
    Table("block", MODELS, UNITS, BLOCK, "perplexity-drop", "50%", seeds=2),
    Table("weight", [MAMBA2, MAMBA1], {**ELEMENTS, "2:4": {"pattern": "2:4"}}, WEIGHT, "sparsegpt", "50%"),
    Table("decay", [MAMBA1], ELEMENTS, DECAY, "sparsessm", "50%", seeds=2),
]
