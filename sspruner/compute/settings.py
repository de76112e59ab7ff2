"""Keep torch's settings around a call from changing its results: autocast, inference mode, default dtype and device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

P = ParamSpec("P")
R = TypeVar("R")

DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps")  # that have an autocast of their own


def undisturbed(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function of a model compute the same whatever torch is set to where it is called."""

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        model = next((value for value in (*args, *kwargs.values()) if isinstance(value, nn.Module)), None)
        with plain_settings(model):
            return function(*args, **kwargs)

    return wrapper


@contextmanager
def plain_settings(model: nn.Module | None = None) -> Iterator[None]:
    """Context manager: no autocast; fp32 and the CPU by default; inference mode only for weights made in it."""
    made_in_inference_mode = model is not None and any(p.is_inference() for p in model.parameters())
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        for device in DEVICE_TYPES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.is_inference_mode_enabled() != made_in_inference_mode:
            stack.enter_context(torch.inference_mode(made_in_inference_mode))
        if torch.get_default_device().type != "cpu":
            mode: Any = torch.device("cpu")  # slows every call of torch down, so only where it is needed
            stack.enter_context(mode)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
