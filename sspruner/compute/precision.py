"""Temporary fp32 parameters: exact in both directions, for precise comparisons and statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def in_fp32(model: nn.Module) -> Iterator[None]:
    """Context manager that converts bf16 and fp16 parameters, also those replaced in the block, to fp32 and back."""
    narrow = [
        (module, leaf, p.dtype)
        for module in model.modules()
        for leaf, p in module._parameters.items()
        if p is not None and p.dtype in (torch.bfloat16, torch.float16)
    ]
    for module, leaf, _ in narrow:
        parameter = module.get_parameter(leaf)
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for module, leaf, dtype in narrow:
            if module._parameters.get(leaf) is not None:
                parameter = module.get_parameter(leaf)
                parameter.data = parameter.data.to(dtype)
