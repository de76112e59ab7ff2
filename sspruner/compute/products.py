"""Capture the inputs of linear layers, also where a model multiplies by their weight itself (Mamba1's dt_proj).

And compute a product once that a scorer's view and the model's own code both ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

MATMUL = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


class Products(TorchFunctionMode):
    """Torch function mode that calls `note(name, input)` before every product of an input with one of the weights.

    weights: weight (out, in) -> name. input: (..., in), as for a linear layer.
    """

    def __init__(self, weights: Mapping[torch.Tensor, str], note: Callable[[str, torch.Tensor], None]) -> None:
        super().__init__()
        self._names = {id(weight): name for weight, name in weights.items()}
        self._note = note

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        if func is F.linear:
            x, weight = (*args, *(keywords[name] for name in ("input", "weight") if name in keywords))[:2]
            if id(weight) in self._names:
                self._note(self._names[id(weight)], x)
        elif func in MATMUL and id(args[0]) in self._names:  # W @ x, x (..., in, T)
            self._note(self._names[id(args[0])], args[1].transpose(-1, -2))
        return func(*args, **(kwargs or {}))


class Remembered(TorchFunctionMode):
    """Torch function mode that computes a product of a linear layer once for equal inputs that follow each other.

    Holds the last input and output of each weight; if one of them was changed in place, the product is computed anew.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[int, tuple[list[Any], list[int]]] = {}  # id of a weight -> (input, weight, output), versions

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is not F.linear or kwargs or not isinstance(args[1], nn.Parameter):
            return func(*args, **(kwargs or {}))
        x, weight, bias = (*args, None)[:3]
        (given, _, added, out), versions = self._last.get(id(weight), ([None] * 4, []))
        unchanged = added is bias and _versions(given, weight, bias, out) == versions
        if unchanged and x.dtype == given.dtype and torch.equal(x, given):
            return out
        held = [x, weight, bias, F.linear(x, weight, bias)]  # the weight is held, so that its id stays its own
        self._last[id(weight)] = held, _versions(*held)
        return held[-1]


def _versions(*tensors: torch.Tensor | None) -> list[int]:
    """Return how often each tensor was changed in place."""
    return [-1 if tensor is None else tensor._version for tensor in tensors]
