"""What linear layers are given, also where a model multiplies by their weight itself (Mamba1's dt_proj)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

MATMUL = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


class Products(TorchFunctionMode):
    """While it is open, `note(name, input)` is called before every product of an input with one of the weights.

    weights: weight (out, in) -> name. input: (..., in), as a linear layer takes it.
    """

    def __init__(self, weights: Mapping[torch.Tensor, str], note: Callable[[str, torch.Tensor], None]) -> None:
        super().__init__()
        self._names = {id(weight): name for weight, name in weights.items()}
        self._note = note

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func is F.linear:
            given, weight = (*args, *(named[name] for name in ("input", "weight") if name in named))[:2]
            if id(weight) in self._names:
                self._note(self._names[id(weight)], given)
        elif func in MATMUL and id(args[0]) in self._names:  # W @ x, x (..., in, T)
            self._note(self._names[id(args[0])], args[1].transpose(-1, -2))
        return func(*args, **(kwargs or {}))
