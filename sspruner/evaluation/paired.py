"""95 % intervals of values by window or by item: seeded bootstrap, paired when two models are compared.

    perplexity            exp(sum_w nll_w / sum_w tokens_w)
    ratio of two          exp(sum_w (nll_w - against_w) / sum_w tokens_w)      the same windows of both
    rate                  sum_w part_w / sum_w count_w                         KL per token, share of tokens
    mean, difference      mean_i x_i, mean_i (x_i - against_i)                 the same items of both
    share                 hits / items, Wilson's score interval

Windows or items are resampled with replacement RESAMPLES times; the interval is from the 2.5th to the 97.5th
percentile, widened to contain the value itself. Tokens of one window depend on each other, so whole windows are drawn.
A bootstrap of equal items, or of a single one, has no width, which does not mean that the value is certain.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from sspruner.errors import InputError
from sspruner.files.fields import number

FEW = 6  # of fewer windows not even the range of all of them covers what is typical 95 % of the time
RESAMPLES = 2000
CHUNK = 2**22  # indices drawn at once
LEVEL, WILSON_Z = (0.025, 0.975), 1.959964


class Interval(NamedTuple):
    """A value and its 95 % interval; in JSON the list [value, low, high]."""

    value: float
    low: float
    high: float

    def to_json(self) -> list[float]:
        """Return [value, low, high]."""
        return [*self]

    @classmethod
    def exactly(cls, value: float) -> Interval:
        """Return the interval of width zero at a value."""
        return cls(value, value, value)

    @classmethod
    def from_json(cls, data: Any) -> Interval:
        """Parse [value, low, high]; a number alone is an interval of width zero, and null reads as NaN.

        Raises TypeError or ValueError for anything else.
        """
        if not isinstance(data, list):
            return cls.exactly(number(data))
        value, low, high = map(number, data)
        return cls(value, low, high)


def perplexity(nll: torch.Tensor, tokens: torch.Tensor, seed: int = 0) -> Interval:
    """Return perplexity from the summed negative log-likelihood, in nats, and token count of each window: both
    (windows,).
    """
    return _exp(rate(nll, tokens, seed))


def perplexity_ratio(nll: torch.Tensor, against: torch.Tensor, tokens: torch.Tensor, seed: int = 0) -> Interval:
    """Return a model's perplexity over another's on the same windows. nll, against, tokens: (windows,)."""
    _check_pairs(nll, against)
    return _exp(rate(nll.double() - against.double(), tokens, seed))


def rate(part: torch.Tensor, count: torch.Tensor, seed: int = 0) -> Interval:
    """Return sum(part) / sum(count), such as KL per token; both (windows,). Raises InputError if all counts are 0."""
    part, count = part.double().cpu(), count.double().cpu()
    _check_pairs(part, count)
    keep = count > 0
    part, count = part[keep], count[keep]
    if not len(part):
        raise InputError("nothing to measure: no window holds a token that is predicted from another")
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    at_once = max(1, CHUNK // len(part))
    for done in range(0, RESAMPLES, at_once):
        picks = torch.randint(len(part), (min(at_once, RESAMPLES - done), len(part)), generator=generator)
        drawn.append(part[picks].sum(1) / count[picks].sum(1))
    value = float(part.sum() / count.sum())
    low, high = torch.cat(drawn).quantile(torch.tensor(LEVEL, dtype=torch.float64)).tolist()
    return Interval(value, min(low, value), max(high, value))


def mean(values: torch.Tensor, seed: int = 0) -> Interval:
    """Return the mean over items. values: (items,)."""
    return rate(values, torch.ones(len(values)), seed)


def difference(values: torch.Tensor, against: torch.Tensor, seed: int = 0) -> Interval:
    """Return the mean of values - against over the same items, both (items,)."""
    _check_pairs(values, against)
    return mean(values.double().cpu() - against.double().cpu(), seed)


def share(hits: torch.Tensor) -> Interval:
    """Return the share of True, bool (items,). Wilson's interval has a width also at 0 and 1."""
    n, z = len(hits), WILSON_Z
    if not n:
        raise InputError("nothing to measure: there are no items")
    p = float(hits.double().mean())
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + side * half) / (1 + z * z / n) for side in (-1, 1))
    return Interval(p, min(max(low, 0.0), p), max(min(high, 1.0), p))


def _check_pairs(values: torch.Tensor, others: torch.Tensor) -> None:
    if values.shape != others.shape or values.ndim != 1:
        raise InputError(f"{tuple(values.shape)} and {tuple(others.shape)} items: not the same items")


def _exp(interval: Interval) -> Interval:
    return Interval(*(math.exp(x) if x < 700 else math.inf for x in interval))
