"""Rows of an evaluation, from the items of a model and those of the model it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from sspruner.evaluation import paired
from sspruner.evaluation.paired import Interval
from sspruner.evaluation.result import Row

MakeInterval = Callable[[Any], Interval]


def row(
    metric: str, values: Any, against: Any, make: MakeInterval, change: Callable[[Any], Interval], *,
    items: int, kind: str = "difference",
) -> Row:  # fmt: skip
    """Return a row from a model's items and the other model's (None without one)."""
    if against is None:
        return Row(metric, make(values), None, None, kind, items)
    return Row(metric, make(values), make(against), change(against), kind, items)


def perplexities(
    metric: str, values: torch.Tensor, against: torch.Tensor | None, count: torch.Tensor, seed: int, items: int
) -> Row:
    """Return a row of perplexities from the nll and the token count of each window."""
    return row(metric, values, against, lambda nll: paired.perplexity(nll, count, seed),
               lambda base: paired.perplexity_ratio(values, base, count, seed), items=items, kind="ratio")  # fmt: skip


def rates(
    metric: str, values: torch.Tensor, against: torch.Tensor | None, count: torch.Tensor, seed: int
) -> Row:  # fmt: skip
    """Return a row of rates, such as KL per token, from the sum and the token count of each window."""
    return row(metric, values, against, lambda part: paired.rate(part, count, seed),
               lambda base: paired.rate(values - base, count, seed), items=len(values))  # fmt: skip


def means(
    metric: str, values: torch.Tensor, against: torch.Tensor | None, seed: int, make: MakeInterval | None = None
) -> Row:
    """Return a row of means over items. make: computes the interval; default: bootstrap."""
    return row(metric, values, against, make or partial(paired.mean, seed=seed),
               lambda other: paired.difference(values, other, seed), items=len(values))  # fmt: skip
