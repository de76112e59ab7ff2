# ruff: noqa: E402 - what the imports below need comes before them
"""The package mamba_ssm on a CPU: imported before it, this puts plain code where the package has compiled kernels.

Its Triton kernels are its own, run by Triton's interpreter; its scan for Mamba1 is its own reference in torch.
"""

from __future__ import annotations

import contextlib
import os
import sys
from types import ModuleType

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
sys.modules["selective_scan_cuda"] = ModuleType("selective_scan_cuda")  # imported by name, called on GPUs alone

import torch
import transformers.generation
from triton.runtime.autotuner import Autotuner

for gone in ("GreedySearchDecoderOnlyOutput", "SampleDecoderOnlyOutput"):  # names of transformers 4
    setattr(transformers.generation, gone, transformers.generation.GenerateDecoderOnlyOutput)
torch.cuda.device = lambda index: contextlib.nullcontext()  # what the kernels are launched in
Autotuner._bench = lambda self, *args, config, **options: [0.0]  # the first variant is the fastest: none is timed

from mamba_ssm.modules import mamba_simple
from mamba_ssm.ops.selective_scan_interface import selective_scan_ref

mamba_simple.selective_scan_fn = selective_scan_ref


def without_fused_path(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model with the path through its mixers that needs no compiled convolution."""
    for layer in model.backbone.layers:
        layer.mixer.use_mem_eff_path = False
    return model.eval()
