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
    """Context manager: no autocast, all bits of fp32, the CPU by default, inference mode for weights of it alone."""
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
        stack.enter_context(whole_products())
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


@contextmanager
def whole_products() -> Iterator[None]:
    """Context manager: products and convolutions of fp32 are computed in fp32, not in TF32 or bf16.

    `torch.set_float32_matmul_precision("medium")` leaves 8 bits of them, on CUDA and on a CPU that has bf16.
    """
    if not hasattr(torch.backends.cudnn, "conv"):  # torch before 2.9
        with _whole_products_of_old_torch():
            yield
        return
    backends: Any = torch.backends
    operations = [kind for of in (backends.cudnn, backends.mkldnn) for kind in (of.conv, of.rnn)]
    operations += [backends.cuda.matmul, backends.mkldnn.matmul]
    before = [operation.fp32_precision for operation in operations]
    try:
        for operation in operations:
            operation.fp32_precision = "ieee"
        yield
    finally:
        for operation, value in zip(operations, before, strict=True):
            operation.fp32_precision = value


@contextmanager
def _whole_products_of_old_torch() -> Iterator[None]:
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions
