"""Constant products: what linear layers put out is the same with the store as without, and so are the gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sspruner.compute.constant import ConstantProducts, Once, Product

ROWS = torch.tensor([1, 3])


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Mixer(nn.Module):
    """A wide layer that is split, one behind it that is called twice, and one that multiplies by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.twice, self.own = nn.Linear(3, 6), nn.Linear(2, 2), nn.Linear(2, 4, bias=False)
        self.requires_grad_(False)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        z, x, b = self.wide(u).split([1, 2, 3], dim=-1)  # rows 0 | 1, 2 | 3, 4, 5
        x = self.twice(torch.tanh(self.twice(x)))
        return torch.cat([z, x, b, (self.own.weight @ x.mT).mT], -1)


def products(mixer: Mixer, own: torch.Tensor) -> dict[str, Product]:
    return {
        "wide": Product(mixer.wide.weight, ROWS),
        "twice": Product(mixer.twice.weight),
        "own": Product(mixer.own.weight, own),
    }


def learned(mixer: Mixer, mode: ConstantProducts, u: torch.Tensor, values: dict[str, torch.Tensor]) -> None:
    with mode.learning(), mode.at(None, values):
        mixer(u)


def test_it_is_the_module_with_other_rows():
    mixer, own = Mixer(), torch.tensor([0])
    values = {"wide": normal(1, 2, 3).requires_grad_(), "own": normal(2, 1, 2).requires_grad_()}
    mode = ConstantProducts(products(mixer, own), Once())
    learned(mixer, mode, normal(0, 1, 5, 3), values)
    other = Mixer()
    other.load_state_dict(mixer.state_dict())
    wide, second = (
        mixer.wide.weight.index_copy(0, ROWS, values["wide"]),
        mixer.own.weight.index_copy(0, own, values["own"]),
    )
    for window in (0, 1, 0, 1):
        u = normal(10 + window, 1, 5, 3)
        with mode.at(window, values):
            found = mixer(u)
        expected = torch.func.functional_call(other, {"wide.weight": wide, "own.weight": second}, (u,))
        assert torch.allclose(found, expected, atol=1e-6)
        for one, two in zip(*(gradients(out, values) for out in (found, expected)), strict=True):
            assert torch.allclose(one, two, atol=1e-5)


def gradients(out: torch.Tensor, values: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad((out * normal(3, *out.shape)).sum(), [*values.values()], retain_graph=True)


def test_only_what_does_not_depend_on_trained_rows_is_stored():
    mixer, own = Mixer(), torch.tensor([0])
    values = {"wide": normal(1, 2, 3).requires_grad_(), "own": normal(2, 1, 2).requires_grad_()}
    found = products(mixer, own)
    mode = ConstantProducts(found, Once())
    learned(mixer, mode, normal(0, 1, 5, 3), values)
    assert {name: product.constant for name, product in found.items()} == {"wide": True, "twice": False, "own": False}


def test_a_layer_that_is_called_twice_is_not_stored():
    """Its two inputs would be taken for one."""
    mixer = Mixer()
    found: dict[str, Any] = {"twice": Product(mixer.twice.weight)}
    mode = ConstantProducts(found, Once())
    learned(mixer, mode, normal(0, 1, 5, 3), {})
    assert not found["twice"].constant


def test_pieces_without_a_trained_row_want_no_gradient():
    layer, mode_products = nn.Linear(3, 6, bias=False).requires_grad_(False), {}
    mode_products["wide"] = Product(layer.weight, ROWS, constant=True)
    values = {"wide": normal(1, 2, 3).requires_grad_()}
    with ConstantProducts(mode_products, Once()).at(0, values):
        pieces = layer(normal(0, 1, 5, 3)).split([1, 2, 3], dim=-1)
        assert [piece.requires_grad for piece in pieces] == [False, True, True]
        assert F.linear(normal(0, 1, 2), normal(2, 3, 2)).shape == (1, 3)  # of others, nothing is known
