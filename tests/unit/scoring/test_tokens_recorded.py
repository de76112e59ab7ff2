"""Scores record how many tokens they were observed on: padding is none."""

from __future__ import annotations

import torch

import sspruner
from sspruner.testing import zoo


def test_padding_is_not_recorded_as_tokens():
    model = zoo("mamba2", seed=0)
    tokens = torch.ones(4, 9, dtype=torch.long)
    mask = torch.ones(4, 9, dtype=torch.bool)
    mask[1, 5:] = False
    data = sspruner.calibration(tokens, model, mask=mask, samples=3, held_out=1)
    scores = sspruner.score(model, "wanda", axis="state", calibration=data)
    assert scores.metadata["tokens"] == str(3 * 9 - 4)
