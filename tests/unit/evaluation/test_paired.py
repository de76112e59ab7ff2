"""Intervals: they hold the value, shrink with more items, and cover what they should."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner.evaluation import paired

VALUES = st.lists(st.floats(-5, 5), min_size=2, max_size=30).map(lambda v: torch.tensor(v, dtype=torch.float64))


@given(VALUES, st.integers(0, 99))
def test_an_interval_holds_its_value(values: torch.Tensor, seed: int) -> None:
    count = torch.arange(1, len(values) + 1)
    weights = values.abs() * count
    expected = {
        "mean": (paired.mean(values, seed), float(values.mean())),
        "rate": (paired.rate(weights, count, seed), float(weights.sum() / count.sum())),
        "perplexity": (paired.perplexity(weights, count, seed), math.exp(weights.sum() / count.sum())),
        "share": (paired.share(values > 0), float((values > 0).double().mean())),
    }
    for name, (interval, value) in expected.items():
        assert interval.value == pytest.approx(value, abs=1e-12), name
        assert interval.low <= interval.value <= interval.high, name
    assert paired.mean(values, seed) == paired.mean(values, seed)


@given(VALUES)
def test_an_interval_shrinks_with_more_of_the_same(values: torch.Tensor) -> None:
    def widths(v: torch.Tensor) -> list[float]:
        found = paired.mean(v), paired.perplexity(v, torch.ones(len(v))), paired.share(v > 0)
        return [interval.high - interval.low for interval in found]

    for one, many in zip(widths(values), widths(values.repeat(25)), strict=True):
        assert many <= one / 2 + 1e-12


@pytest.mark.slow
def test_it_covers_the_truth_as_often_as_it_says() -> None:
    draws = torch.randn(200, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hit = [interval.low <= 0 <= interval.high for interval in map(paired.mean, draws)]
    assert 0.88 <= sum(hit) / len(hit) <= 0.985


def test_wilson_is_as_published() -> None:
    for hits, n, low, high in (
        (0, 10, 0, 0.2775),
        (10, 10, 0.7225, 1),
        (5, 10, 0.2366, 0.7634),
        (81, 263, 0.2553, 0.3662),
    ):
        found = paired.share(torch.arange(n) < hits)
        assert found == pytest.approx((hits / n, low, high), abs=1e-4)


def test_pairs_are_sharper_than_two_intervals() -> None:
    """Windows differ much among each other, models little on the same window."""
    generator = torch.Generator().manual_seed(1)
    against = 50 + 20 * torch.randn(40, generator=generator, dtype=torch.float64)
    own, count = against + 1 + 0.1 * torch.randn(40, generator=generator, dtype=torch.float64), torch.full((40,), 20)
    ratio = paired.perplexity_ratio(own, against, count)
    assert ratio.value == pytest.approx(paired.perplexity(own, count).value / paired.perplexity(against, count).value)
    assert 1 < ratio.low < ratio.high < 1.06
    assert paired.perplexity(own, count).low < paired.perplexity(against, count).high
    assert paired.difference(own, against).low > 0.9
    assert paired.difference(own, own) == (0, 0, 0)


def test_windows_without_tokens_change_nothing_and_nothing_is_an_error() -> None:
    part, count = torch.tensor([3.0, 5.0, 1.0]), torch.tensor([2, 4, 1])
    padded = paired.rate(torch.cat([torch.zeros(4), part]), torch.cat([torch.zeros(4), count]))
    assert padded == paired.rate(part, count)
    for wrong in (lambda: paired.rate(part * 0, count * 0), lambda: paired.share(torch.zeros(0, dtype=torch.bool))):
        with pytest.raises(sspruner.InputError, match="nothing to measure"):
            wrong()
    with pytest.raises(sspruner.InputError, match="not the same items"):
        paired.difference(part, part[:2])
