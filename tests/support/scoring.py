"""Run scorers on tiny models, and change the models' units for symmetry tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import assume

import sspruner
from sspruner.calibrate.sources import Calibration
from sspruner.graph.group import DependencyGroup
from sspruner.plans.reduction import Selection
from support.tiny import tokens
from support.zoo import rounding


def calibrated(ids: torch.Tensor, mask: torch.Tensor | None = None) -> Calibration:
    """Return a calibration in which every row is observed, and none is held out."""
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    return Calibration(ids, mask, ids[:1], mask[:1], "tokens", 0, held_out_is_separate=False)


def importance(model: torch.nn.Module, ids: torch.Tensor, scorer: Any = "ghost", **kwargs: Any) -> dict:
    mask = kwargs.pop("mask", None)
    return sspruner.score(model, scorer, calibration=calibrated(ids, mask), **kwargs).importance


@contextmanager
def batches_of(tokens_per_batch: int) -> Iterator[None]:
    """Context manager that sets the number of calibration tokens in a batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sspruner.calibrate.sources.TOKENS_PER_BATCH", tokens_per_batch)
        yield


def shown(
    model: torch.nn.Module, ids: torch.Tensor, axis: str, needs: str = "activations", mask: torch.Tensor | None = None
) -> list[sspruner.SSMView]:
    """Return every view passed to a scorer of this axis, in order."""
    found = []

    class Spy(sspruner.Scorer):
        name, axes = "spy", sspruner.AXES

        def observe(self, view: sspruner.SSMView) -> None:
            self.shape = (view.group.groups, view.group.units)
            found.append(view)

        def importance(self) -> torch.Tensor:
            return torch.zeros(self.shape)

    Spy.needs = needs
    importance(model, ids, Spy, axis=axis, mask=mask)
    return found


def units(group: DependencyGroup) -> list[tuple[int, int]]:
    """Yield (set, unit) for every unit of a dependency group."""
    return [(g, u) for g in range(group.groups) for u in range(group.units)]


def without(group: DependencyGroup, g: int, u: int) -> Selection:
    """Remove one unit of one set; a mask can have uneven counts, a slice cannot."""
    return Selection(
        group.units,
        tuple(tuple(k for k in range(group.units) if (s, k) != (g, u)) for s in range(group.groups)),
    )


def permute_states(model: torch.nn.Module, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Renumber the states of every group of every layer. Return the permutations, (G, N) per layer group."""
    orders = {}
    for name, group in sspruner.trace(model).on_axis("state").items():
        order = torch.stack([torch.randperm(group.units, generator=generator) for _ in range(group.groups)])
        orders[name] = order
        for member in group.members:
            (dim,) = member.dims
            parameter = model.get_parameter(member.tensor).data.movedim(dim, 0)
            for g in range(group.groups):
                rows = member.index[g, :, 0]
                parameter[rows] = parameter[rows[order[g]]].clone()
    return orders


def loose(model: torch.nn.Module) -> float:
    """Return a tolerance: 1e-4, or the effect of one rounding on this model if that is more."""
    tolerance = max(1e-4, 30 * rounding(model, tokens()))
    assume(tolerance < 1e-2)
    return tolerance
