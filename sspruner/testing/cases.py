"""Test cases for scorers: a family, its structure, optionally an earlier uneven cut, and token windows."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from hypothesis import strategies as st

from sspruner.axes import WHOLE_MODEL
from sspruner.calibrate.sources import Calibration
from sspruner.graph.trace import trace
from sspruner.plans.plan import Plan
from sspruner.surgery.slice import slice_model
from sspruner.testing.models import FAMILIES, SHAPE, SHAPES, VOCABULARY, zoo
from sspruner.testing.plans import selection, sizes

# The first value of each is that of the richest model of the family, which is the first example.
_CHOICES: dict[str, tuple[Any, ...]] = {
    "groups": (2, 1),
    "heads": (2, 1, 3),
    "channels": (4, 6),
    "state": (6, 1, 2, 8),
    "hidden": (8, 16),
    "rank": (3, 1, 4),
    "kv": (2, 1),
    "ratio": (2, 1),
    "bias": (True, False),
    "conv_bias": (True, False),
}
_MAMBA2 = ("groups", "heads", "channels", "state", "bias", "conv_bias")
_MAMBA1 = ("hidden", "state", "rank", "bias", "conv_bias")
_NAMES = {  # settings that vary between cases
    "mamba2": _MAMBA2,
    "mamba": _MAMBA1,
    "falcon_mamba": _MAMBA1,
    "zamba2": ("groups", "heads", "channels", "state", "bias"),
    "bamba": (*_MAMBA2, "kv", "ratio"),
    "granitemoehybrid": ("groups", "heads", "state", "bias", "conv_bias", "kv", "ratio"),
    "falcon_h1": (*_MAMBA2, "kv", "ratio"),
    "nemotron_h": (*_MAMBA2, "kv", "ratio"),
    "jamba": (*_MAMBA1, "kv", "ratio"),
    "zamba": ("heads", "state", "rank", "bias", "conv_bias"),
    **dict.fromkeys(("kimi_linear", "bailing_hybrid", "glm5_next_text"), ("heads", "channels", "bias", "kv", "ratio")),
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text", "olmo_hybrid"),
        ("groups", "heads", "channels", "state", "kv", "ratio"),
    ),
}


@dataclass(frozen=True)
class Case:
    """Model and calibration of one test; `str` shows how to build it again.

    structure   differences from `zoo(family)`
    cut         seed of an earlier cut of one dependency group of the first mixer, None for none
    lengths     tokens of each calibration sequence without its padding, the longest first
    """

    family: str
    structure: dict[str, Any]
    seed: int
    cut: int | None
    lengths: tuple[int, ...]
    done: list[str] = field(default_factory=list, compare=False)  # the cut, in words

    def model(self, dtype: torch.dtype = torch.float32) -> Any:
        """Build the model, always with the same values."""
        model = zoo(self.family, seed=self.seed, dtype=dtype, **self.structure)
        if self.cut is None:
            return model
        graph, pick = trace(model), random.Random(self.cut)
        first = graph.layers[0].path
        cuttable = [g for g in graph.groups.values() if g.layer == first and g.axis not in WHOLE_MODEL and sizes(g)]
        if cuttable:
            group = pick.choice(cuttable)
            after = pick.choice(sizes(group))
            slice_model(model, Plan({group.name: selection(group.groups, group.units, after, self.cut)}), graph)
            self.done[:] = [f"{group.name} cut to {after}"]
        return model

    def data(self, garbage: int = 0) -> Calibration:
        """Return windows padded on the right. `garbage` seeds the tokens in the padding."""
        length, rows = max(self.lengths), len(self.lengths)
        mask = torch.arange(length) < torch.tensor(self.lengths)[:, None]
        real, padding = (_tokens(rows, length, seed) for seed in (self.seed, self.seed + 1 + garbage))
        return windows(torch.where(mask, real, padding), mask)

    def other(self) -> Case:
        """Return a case of the same sizes with other weights and tokens."""
        return replace(self, seed=self.seed + 10_000)

    def __str__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.structure.items())
        cut = f", {self.done[0]}" if self.done else ""
        return f"zoo({self.family!r}{options}, seed={self.seed}){cut}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))  # in hypothesis's own notes


@st.composite
def cases(draw: st.DrawFn, families: tuple[str, ...], sequences: int, length: int) -> Case:
    """Draw a case. The first example is the plain `zoo(family)` of the first family, without a cut."""
    family = draw(st.sampled_from(families))
    default = SHAPE | SHAPES[family]
    structure = {}
    for name in _NAMES[family]:
        value = draw(st.sampled_from(_CHOICES[name]))
        if value != default[name]:
            structure[name] = value
    return Case(
        family=family,
        structure=structure,
        seed=draw(st.integers(0, 2**10)),
        cut=draw(st.one_of(st.none(), st.integers(0, 2**10))),
        lengths=(length, *draw(st.lists(st.integers(3, length - 1), min_size=sequences - 1, max_size=sequences - 1))),
    )


def windows(tokens: torch.Tensor, mask: torch.Tensor) -> Calibration:
    """Return a calibration that observes every row and holds none out."""
    return Calibration(tokens, mask, tokens[:1], mask[:1], "tokens", 0, held_out_is_separate=False)


class OneByOne(Calibration):
    """Calibration with one sequence per batch, with its padding."""

    def batches(self, size: int | None = None, *, logits: bool = False) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield from super().batches(1)


class Trimmed(Calibration):
    """Calibration with one sequence per batch, without its padding."""

    def batches(self, size: int | None = None, *, logits: bool = False) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for tokens, mask in super().batches(1):
            yield tokens[:, mask[0]], mask[:, mask[0]]


def _tokens(rows: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@cache
def families_by_axis() -> dict[str, tuple[str, ...]]:
    """Return the families that have each axis, including the axes of single elements."""
    by_axis: dict[str, list[str]] = {}
    for family in FAMILIES:
        for axis in axes_of(zoo(family)):
            by_axis.setdefault(axis, []).append(family)
    return {axis: tuple(names) for axis, names in by_axis.items()}


def axes_of(model: Any) -> list[str]:
    """Return every axis of a model."""
    graph = trace(model)
    return list(dict.fromkeys(g.axis for g in (*graph.groups.values(), *graph.elements.values())))
