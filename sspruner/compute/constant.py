"""Compute what training does not change once: products of linear layers whose inputs depend on nothing that is trained.

Training a few rows of a wide layer (the rows of B and C in in_proj) then costs the product of these rows alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


@dataclass
class Product:
    """One linear layer: its weight (out, in), and the rows that are trained, with their values; none if frozen.

    constant: whether its input is the same at every step; known after a first pass that records gradients.
    """

    weight: torch.Tensor
    rows: torch.Tensor | None = None
    values: torch.Tensor | None = None
    constant: bool = False

    def whole(self) -> torch.Tensor:
        """Return the weight with the trained rows in it."""
        if self.rows is None or self.values is None:
            return self.weight
        return self.weight.index_copy(0, self.rows, self.values)


class ConstantProducts(TorchFunctionMode):
    """Torch function mode that takes the constant part of linear layers from a store, and computes trained rows.

    Set `window` to the number of the inputs that run next. `learning`: the pass that finds out which inputs are
    constant.
    """

    def __init__(self, products: Mapping[str, Product]) -> None:
        super().__init__()
        self._products = {id(product.weight): (name, product) for name, product in products.items()}
        self._store: dict[tuple[str, int], torch.Tensor] = {}
        self.window, self.learning = 0, False

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is not F.linear or id(args[1]) not in self._products:
            return func(*args, **(kwargs or {}))
        x, bias = args[0], args[2] if len(args) > 2 else (kwargs or {}).get("bias")
        name, product = self._products[id(args[1])]
        if self.learning:
            product.constant = not x.requires_grad
        if not product.constant:
            return F.linear(x, product.whole(), bias)
        if (name, self.window) not in self._store:
            with torch.no_grad():
                self._store[name, self.window] = F.linear(x, product.weight)
        out = self._store[name, self.window]  # (..., out)
        if product.rows is not None and product.values is not None:
            out = out.index_copy(-1, product.rows, F.linear(x, product.values))
        return out if bias is None else out + bias
