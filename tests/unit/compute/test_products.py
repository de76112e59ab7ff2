"""Products of linear layers that are asked for twice: computed once, and never another product's result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.overrides import TorchFunctionMode

from sspruner.compute.products import Remembered


class Counted(TorchFunctionMode):
    """Counts the products that are computed."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.count += func is F.linear
        return func(*args, **(kwargs or {}))


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2), st.booleans()), max_size=12))
def test_every_product_is_its_own(calls: list[tuple[int, int, bool]]) -> None:
    """Any order of two layers and three inputs, equal ones as other tensors, with and without the layer's bias."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 3), nn.Linear(4, 3)]
    with torch.no_grad(), Remembered():
        for layer, number, biased in calls:
            x, (weight, bias) = torch.full((2, 4), float(number)), layers[layer].parameters()
            given = bias if biased else None
            with torch._C.DisableTorchFunctionSubclass():
                expected = (x[:, None] * weight.data).sum(-1) + (bias.data if biased else 0)
            torch.testing.assert_close(F.linear(x, weight, given), expected)


def test_a_product_of_equal_inputs_is_computed_once() -> None:
    layer, x, counted = nn.Linear(4, 3), torch.randn(2, 4), Counted()
    with torch.no_grad(), counted, Remembered():
        first = layer(x)
        assert layer(x.clone()) is first
    assert counted.count == 1


@pytest.mark.parametrize("change", ["output", "input", "weight", "bias", "dtype"])
def test_what_was_changed_is_computed_anew(change: str) -> None:
    layer, x = nn.Linear(4, 3), torch.ones(2, 4)
    with torch.no_grad(), Remembered():
        first = layer(x)
        if change == "output":
            first.zero_()
        elif change == "input":
            x.mul_(2)
        elif change in ("weight", "bias"):
            getattr(layer, change).mul_(2)
        else:
            layer, x = layer.double(), x.double()
        torch.testing.assert_close(layer(x), layer.weight.mul(x[:1]).sum(-1).add(layer.bias).expand(2, 3))
