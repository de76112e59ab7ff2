"""The bootstrap's interval is of 95 %: as wide as the normal one where items are many."""

from __future__ import annotations

import pytest
import torch

from sspruner.evaluation.paired import WILSON_Z, mean


def test_many_items_have_the_normal_interval():
    values = torch.randn(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = mean(values)
    half = WILSON_Z * float(values.std()) / len(values) ** 0.5
    assert found.value == pytest.approx(float(values.mean()))
    assert found.high - found.low == pytest.approx(2 * half, rel=0.08)  # one of 90 % is 16 % narrower
