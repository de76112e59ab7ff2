"""Loops over tokens, as transformers' Mamba1 scans run on a CPU, made differentiable in linear time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

AT_ONCE = 4  # tensors that one loop steps through: decay, input, C


class TokenSteps(TorchFunctionMode):
    """x[:, :, t] for t after t as parts of one `unbind`: the same views, and the same gradients.

    The gradient of an index is a tensor of zeros as large as x, with one part filled in: T of them for T steps, which
    makes a scan over 256 tokens spend nearly all of its backward pass on zeros. That of `unbind` is one stack. A tensor
    that is indexed once is left alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: OrderedDict[tuple[int, int], tuple[torch.Tensor, int, tuple[torch.Tensor, ...]]] = OrderedDict()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__ and torch.is_grad_enabled():
            x, key = args
            if x.requires_grad and x.ndim > 2 and (dim := step_dimension(key)) and (parts := self._parts(x, dim)):
                return parts[key[dim]]
        return func(*args, **(kwargs or {}))

    def _parts(self, x: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
        """Of a tensor that was seen before and not written to since; of any other, nothing."""
        at = (id(x), dim)
        known, version, parts = self._seen.pop(at, (None, -1, ()))
        seen = known is x and version == x._version  # an id is free again after its tensor is gone
        parts = (parts or torch.unbind(x, dim)) if seen else ()
        self._seen[at] = (x, x._version, parts)
        if len(self._seen) > AT_ONCE:
            self._seen.popitem(last=False)
        return parts


def step_dimension(key: Any) -> int:
    """The dimension, after the first, in which a key like [:, :, t] or [:, t] picks one index; 0 for any other key."""
    if not isinstance(key, tuple):
        return 0
    picked = [d for d, k in enumerate(key) if type(k) is int]
    whole = all(type(k) is int or (isinstance(k, slice) and k == slice(None)) for k in key)
    return picked[0] if whole and len(picked) == 1 else 0


@contextmanager
def differentiable() -> Iterator[None]:
    """Autograd on, and loops over tokens linear in their number."""
    with torch.enable_grad(), TokenSteps():
        yield
