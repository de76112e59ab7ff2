"""Numbers of a report: the share of zeros, not of what stays; what the pruned model costs, not the dense one."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from sspruner.evaluation.damage import Damage
from sspruner.evaluation.paired import Interval
from sspruner.pruning.report import measured, sparsity_of


def test_zeros_are_counted_by_tensor_and_in_total():
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 4))
    with torch.no_grad():
        for weight in (model[0].weight, model[1].weight):
            weight.fill_(1.0)
        model[0].weight[0, :3] = 0
        model[1].weight[0, 0] = 0
    elements = {f"{i}:weight": SimpleNamespace(tensor=f"{i}.weight", axis="weight") for i in range(2)}
    found = sparsity_of(model, SimpleNamespace(elements=elements), ["weight"])
    assert (found["elements"], found["zeros"], found["sparsity"]) == (16, 4, 0.25)
    assert found["tensors"]["0.weight"] == {"shape": [2, 4], "zeros": 3, "sparsity": 0.375}
    assert found["tensors"]["1.weight"] == {"shape": [4, 2], "zeros": 1, "sparsity": 0.125}
    assert sparsity_of(model, SimpleNamespace(elements=elements), ["state"]) == {}


def test_what_is_measured_is_the_pruned_model():
    ratio = Interval(5 / 3, 1.5, 2.0)
    assert measured(Damage(3.0, 5.0, 0.25, 7, ratio)) == {
        "perplexity": 5.0, "perplexity_ratio": [5 / 3, 1.5, 2.0], "kl_to_dense": 0.25}  # fmt: skip
