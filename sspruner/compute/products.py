"""Capture the inputs of linear layers, also where a model multiplies by their weight itself (Mamba1's dt_proj)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
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
