"""Fingerprint of a model's weights, so that a plan or a score file is never applied to another model."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from sspruner.compute.device import in_turn

SAMPLES_PER_TENSOR = 4096


def fingerprint(model: nn.Module) -> str:
    """Return a SHA-256 hash (16 hex digits) of every parameter's name, shape and up to 4096 evenly spaced values.

    Values are rounded to bf16 first, so that a checkpoint has the same fingerprint whether it is read as fp32 or bf16.
    """
    digest = hashlib.sha256()
    for name, p in in_turn(model):
        flat = p.detach().reshape(-1)
        step = max(1, flat.numel() // SAMPLES_PER_TENSOR)
        sample = flat[::step].to(torch.bfloat16).cpu().contiguous()
        digest.update(f"{name}{tuple(p.shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
