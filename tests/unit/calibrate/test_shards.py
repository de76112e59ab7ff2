"""The part of the calibration that each process observes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner.calibrate import shards
from sspruner.calibrate.shards import part_of_this_process
from sspruner.testing.cases import windows


def parts(data: Any, count: int) -> list[Any]:
    """What each of `count` processes observes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "world", lambda: count)
        found = []
        for number in range(count):
            patch.setattr(shards, "rank", lambda number=number: number)
            found.append(part_of_this_process(data))
    return found


@given(sequences=st.integers(1, 9), count=st.integers(1, 5), seed=st.integers(0, 99))
def test_each_sequence_is_observed_once(sequences: int, count: int, seed: int) -> None:
    drawn = torch.Generator().manual_seed(seed)
    rows = torch.randint(31, (sequences, 6), generator=drawn)
    data = windows(rows, torch.rand(rows.shape, generator=drawn) < 0.7)
    if sequences < count:
        with pytest.raises(sspruner.InputError, match=f"{sequences} sequences for {count} processes"):
            parts(data, count)
        return
    found = parts(data, count)
    sizes = [len(part.tokens) for part in found]
    assert max(sizes) - min(sizes) <= 1
    seen = sorted(row for part in found for row in torch.cat([part.tokens, part.mask], 1).tolist())
    assert seen == sorted(torch.cat([data.tokens, data.mask], 1).tolist())
