"""Which rows go: each set's own units, and of several dimensions the right ones in whatever order they are named."""

from __future__ import annotations

import torch

from sspruner.graph.group import Member
from sspruner.plans.reduction import Selection
from sspruner.surgery.mask import dropped_rows
from sspruner.surgery.slice import without_rows


def test_every_set_loses_its_own_units():
    member = Member("in_proj.weight", (0,), "B", torch.arange(6).view(2, 3, 1), row_size=1)
    assert dropped_rows(member, Selection(3, ((0, 1), (1, 2)))).tolist() == [2, 3]


def test_rows_of_several_dimensions_are_numbered_before_any_other_cut():
    tensor = torch.arange(24).view(3, 4, 2)
    rows = torch.tensor([0, 5, 10])  # (0, 0), (1, 1) and (2, 2), of the 3 x 4
    kept = without_rows(tensor, {(0,): torch.tensor([0]), (0, 1): rows})
    expected = torch.stack([tensor[1, [0, 2, 3]], tensor[2, [0, 1, 3]]])
    assert torch.equal(kept, expected)
