"""Compute what training does not change once: products of linear layers whose inputs depend on nothing that is trained.

Training a few rows of a wide layer (those of B and C in in_proj) then costs the product of these rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from sspruner.compute.products import MATMUL

SPLIT = (torch.split, torch.Tensor.split)


class Once:
    """Store of what is the same at every step of training, for each window.

    window: number of the window that runs now; None to store nothing.
    """

    def __init__(self) -> None:
        self.window: int | None = None
        self._store: dict[tuple[str, int], torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, name: str, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return what `compute` returns: computed the first time for this name and window, then from the store."""
        if self.window is None:
            return compute()
        if (name, self.window) not in self._store:
            self._store[name, self.window] = compute()
        return self._store[name, self.window]


@dataclass
class Product:
    """One linear layer: its weight (out, in), and the rows of it that are trained; None if it is frozen.

    constant: whether it is computed once for each window, from the same input at every step; `learning` finds out.
    """

    weight: torch.Tensor
    rows: torch.Tensor | None = None
    calls: int = 0
    constant: bool = False


class ConstantProducts(TorchFunctionMode):
    """Torch function mode that takes the constant part of linear layers from a store, and computes trained rows.

    products: name of a weight -> its layer. once: the store.
    """

    def __init__(self, products: Mapping[str, Product], once: Once) -> None:
        super().__init__()
        self._products = {id(product.weight): (name, product) for name, product in products.items()}
        self._once = once
        self._values: Mapping[str, torch.Tensor] = {}
        self._learning = False
        self._partly: list[tuple[torch.Tensor, torch.Tensor]] = []  # outputs of this pass, their trained rows

    @contextmanager
    def at(self, window: int | None, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Context manager to run one window, by its number, with these values of trained rows.

        window: None to store nothing.
        """
        self._once.window, self._values = window, values
        with self:
            yield
        self._partly.clear()

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Context manager for one pass that records gradients: an input without one is constant."""
        self._learning = True
        try:
            yield
        finally:
            self._learning = False

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in SPLIT:
            return self._split(func(*args, **(kwargs or {})), args[0])
        if func in MATMUL and id(args[0]) in self._products:  # W @ x, as Mamba1's mixers write dt_proj
            name, product = self._products[id(args[0])]
            return func(self._whole(name, product), *args[1:], **(kwargs or {}))
        if func is not F.linear or id(args[1]) not in self._products:
            return func(*args, **(kwargs or {}))
        x, bias = args[0], args[2] if len(args) > 2 else (kwargs or {}).get("bias")
        name, product = self._products[id(args[1])]
        if self._learning:
            product.calls += 1
            product.constant = product.calls == 1 and not x.requires_grad
        if not product.constant:
            return F.linear(x, self._whole(name, product), bias)
        rows, out = product.rows, self._once(name, lambda: F.linear(x, product.weight))  # (..., out)
        if rows is not None:
            out = out.index_copy(-1, rows, F.linear(x, self._values[name]))
        out = out if bias is None else out + bias
        if rows is not None and (bias is None or not bias.requires_grad):
            self._partly.append((out, rows))
        return out

    def _whole(self, name: str, product: Product) -> torch.Tensor:
        """Return a weight with the values of its trained rows: (out, in)."""
        rows, weight = product.rows, product.weight
        return weight if rows is None else weight.index_copy(0, rows, self._values[name])

    def _split(self, pieces: tuple[torch.Tensor, ...], whole: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the pieces of a product along its rows; no gradient is computed for those without a trained row."""
        rows = next((rows for out, rows in self._partly if out is whole), None)
        if rows is None or sum(piece.shape[-1] for piece in pieces) != whole.shape[-1]:
            return pieces
        found, start = [], 0
        for piece in pieces:
            until = start + piece.shape[-1]
            found.append(piece if bool(((rows >= start) & (rows < until)).any()) else piece.detach())
            start = until
        return tuple(found)
