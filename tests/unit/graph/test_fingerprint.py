"""A fingerprint names the weights of a model, whichever parameter differs."""

from __future__ import annotations

import copy

import torch
from torch import nn

from sspruner.graph.fingerprint import fingerprint


def test_a_change_of_any_parameter_changes_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 5), nn.LayerNorm(5))
    known = fingerprint(model)
    assert fingerprint(copy.deepcopy(model)) == known
    for name, _ in model.named_parameters():
        other = copy.deepcopy(model)
        other.get_parameter(name).data.view(-1)[0] += 1
        assert fingerprint(other) != known, name


def test_it_is_the_same_in_fp32_and_bf16():
    torch.manual_seed(0)
    narrow = nn.Linear(4, 5).bfloat16()
    assert fingerprint(copy.deepcopy(narrow).float()) == fingerprint(narrow)
