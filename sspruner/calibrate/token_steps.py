"""Linear-time autograd for loops over tokens, such as transformers' Mamba1 scan on the CPU."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

AT_ONCE = 4  # number of tensors remembered: one loop indexes decay, input and C


class TokenSteps(TorchFunctionMode):
    """Torch function mode that computes x[:, :, t] for successive t from one `unbind`: same views, same gradients.

    The gradient of an index operation is a tensor of zeros as large as x with one part filled in: T of them for T
    steps, so that a scan over 256 tokens spends nearly all of its backward pass on zeros. The gradient of `unbind` is
    one stack. A tensor that is indexed only once is not changed.
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
        """Return the unbound parts of a tensor that was indexed before and not written to since, else ()."""
        at = (id(x), dim)
        known, version, parts = self._seen.pop(at, (None, -1, ()))
        seen = known is x and version == x._version  # an id may be reused after its tensor was freed
        parts = (parts or torch.unbind(x, dim)) if seen else ()
        self._seen[at] = (x, x._version, parts)
        if len(self._seen) > AT_ONCE:
            self._seen.popitem(last=False)
        return parts


def step_dimension(key: Any) -> int:
    """Return the dimension, after the first, in which a key like [:, :, t] or [:, t] picks one index; else 0."""
    if not isinstance(key, tuple):
        return 0
    picked = [d for d, k in enumerate(key) if type(k) is int]
    whole = all(type(k) is int or (isinstance(k, slice) and k == slice(None)) for k in key)
    return picked[0] if whole and len(picked) == 1 else 0


@contextmanager
def differentiable() -> Iterator[None]:
    """Context manager that enables autograd, with loops over tokens in linear time."""
    with torch.enable_grad(), TokenSteps():
        yield
