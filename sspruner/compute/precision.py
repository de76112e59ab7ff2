"""Narrow parameters as fp32 for a while: exact both ways, so that comparisons and statistics are sharp."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def in_fp32(model: nn.Module) -> Iterator[None]:
    """bf16 and fp16 parameters as fp32 inside the block, and back after it, also where the block replaced them."""
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
