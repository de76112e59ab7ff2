"""Context manager that speeds up a model's own code on the CPU. Results differ by rounding only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from sspruner.compute.products import MATMUL

CHUNK = 64  # chunk length of a scan: larger chunks need more work, smaller ones more matrix products
ROWS = 16  # smallest number of input rows for which converting the weight to fp32 pays off
NARROW = (torch.bfloat16, torch.float16)
SLOW = ("DEFAULT", "AVX2")  # CPU capabilities, as torch names them, without instructions for bf16 and fp16


@contextmanager
def quick_on_cpu(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Context manager for a CPU: scans in chunks of at most CHUNK steps, and products in fp32 (`Wide`).

    The chunk size is set on the modules that have one, never in the config, and is always restored.
    """
    if device.type != "cpu":
        yield
        return
    sizes = {
        module: size
        for module in model.modules()
        if isinstance(size := module.__dict__.get("chunk_size"), int) and size > CHUNK
    }
    for module in sizes:
        module.chunk_size = CHUNK  # type: ignore[assignment]
    try:
        with Wide() if torch.backends.cpu.get_cpu_capability() in SLOW else nullcontext():
            yield
    finally:
        for module, size in sizes.items():
            module.chunk_size = size  # type: ignore[assignment]


class Wide(TorchFunctionMode):
    """Torch function mode that computes products of bf16 or fp16 tensors on a CPU in fp32 and rounds once.

    The result is the product's definition; a processor without instructions for it takes seven times as long. Open it
    outside `Products`, which identifies weights by identity. Nothing is changed where gradients are recorded: autograd
    would keep the fp32 copies.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (func is F.linear or func is F.conv1d or func in MATMUL) and not torch.is_grad_enabled():
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
            dtype, first = tensors[0].dtype, tensors[0]
            if (
                dtype in NARROW
                and all(t.dtype == dtype and t.device.type == "cpu" for t in tensors)
                and max(t.numel() // max(t.shape[-1], 1) for t in tensors if t is first or func in MATMUL) >= ROWS
            ):
                wide = func(*map(_wide, args), **{name: _wide(value) for name, value in kwargs.items()})
                return wide.to(dtype)
        return func(*args, **kwargs)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) else value
