"""Bar experts: while a mask is on, a router's logits of dropped experts are -inf, so that no token chooses them.

A router that adds a bias before the choice needs none of this: there the bias itself is -inf.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

_HOOKS = "_sspruner_barred"  # attribute of a router: the handles of its hooks


def bar(router: nn.Module, experts: torch.Tensor) -> None:
    """Make the logits of some experts, int64 (n,), -inf in every forward of a router, until `unbar`."""
    barrier = _Barrier(experts)
    handles = [
        router.register_forward_pre_hook(barrier.enter),
        router.register_forward_hook(barrier.leave, always_call=True),  # also if the forward raises
    ]
    setattr(router, _HOOKS, handles)


def unbar(router: nn.Module) -> None:
    """Undo `bar`."""
    for handle in getattr(router, _HOOKS):
        handle.remove()
    delattr(router, _HOOKS)


class _Barrier:
    """Hooks of one router, which open and close the function mode that changes its logits."""

    def __init__(self, experts: torch.Tensor) -> None:
        self.experts = experts
        self.open: list[_Logits] = []

    def enter(self, router: Any, args: tuple[Any, ...]) -> None:
        self.open.append(_Logits(router.weight, self.experts))
        self.open[-1].__enter__()  # type: ignore[no-untyped-call]

    def leave(self, router: Any, args: tuple[Any, ...], out: Any) -> None:
        self.open.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]


class _Logits(TorchFunctionMode):
    """Torch function mode that sets some columns of the products of an input with one weight, (E, in), to -inf."""

    def __init__(self, weight: torch.Tensor, columns: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.columns = weight, columns

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.linear and any(value is self.weight for value in (*args, *(kwargs or {}).values())):
            return out.index_fill(-1, self.columns.to(out.device), -torch.inf)  # (..., E), a new tensor
        return out
