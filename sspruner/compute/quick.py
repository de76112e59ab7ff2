"""What makes a model's own code quick on a CPU, while it is open: other roundings, the same function."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from sspruner.compute.products import MATMUL

CHUNK = 64  # steps of a chunk scan that one matrix product takes: work grows with it, the number of products falls
ROWS = 16  # of an input: below it, widening the weight costs more than it saves
NARROW = (torch.bfloat16, torch.float16)
SLOW = ("DEFAULT", "AVX2")  # processors, in torch's words, that multiply bf16 and fp16 number by number


@contextmanager
def quick_on_cpu(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Chunk scans in chunks of at most CHUNK steps and products as `Wide`, inside the block, if `device` is a CPU.

    The size of a chunk is set on the modules that have one, never in the config, and is restored in any case.
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
    """While it is open, products of bf16 or fp16 tensors on a CPU are taken in fp32 and rounded once.

    That is what such a product is by definition; a processor without instructions for it takes seven times as long.
    Open it outside `Products`, which knows weights by identity. Nothing is changed where gradients are recorded: they
    would keep the wide copies.
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
