"""Refuse models that cannot be cut as they are, by name and before any work: wrapped, split, or quantised ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sspruner.errors import ModelError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
QUANTISERS = ("bitsandbytes", "torchao", "auto_gptq", "gptqmodel", "awq", "compressed_tensors", "hqq", "optimum.quanto",
              "torch.ao.nn.quantized", "torch.ao.nn.quantizable")  # fmt: skip
FIRST = "prune first, then quantise: a quantised weight has no rows that could be taken out"
UNQUANTISED = "save it before it is quantised, and quantise what sspruner.load returns"


def check_usable(model: nn.Module) -> None:
    """Raise ModelError for a model that something wraps, splits over devices or has quantised, and say what to do."""
    name = type(model).__name__
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise ModelError(
            f"{name}: torch.compile wraps the model; give the model itself, model._orig_mod, and compile after"
        )
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ModelError(f"{name}: wraps the model; give the model itself, model.module")
    for path, module in model.named_modules():
        if why := _split(module):
            raise ModelError(f"{path or name}: {why}")
        for leaf, tensor in module._parameters.items():
            if tensor is not None and type(tensor.data).__name__ == "DTensor":
                raise ModelError(
                    f"{path}.{leaf}: its weights are split over processes; prune the model before they are"
                )
    check_not_quantised(model, FIRST)


def check_not_quantised(model: nn.Module, instead: str) -> None:
    """Raise ModelError that names the first quantised weight, and says what to do instead."""
    name = type(model).__name__
    if (quantised := getattr(getattr(model, "config", None), "quantization_config", None)) is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        raise ModelError(f"{name}: its weights are quantised ({getattr(method, 'value', method)!s}); {instead}")
    for path, module in model.named_modules():
        if why := _quantised(module):
            raise ModelError(f"{path or name}: {why}; {instead}")
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and (why := _quantised_tensor(leaf, tensor)):
                raise ModelError(f"{path}.{leaf}: {why}; {instead}")


def check_present(model: nn.Module) -> None:
    """Raise ModelError that names the first weight that is nowhere, on the meta device."""
    for name, p in model.named_parameters():
        if p.is_meta:
            raise ModelError(
                f"{name}: is on the meta device, without values; load the model with sspruner.load, and one that does "
                "not fit in memory with sspruner.load(..., offload=FOLDER)"
            )


def check_vocabulary(model: Any) -> None:
    """Raise ModelError unless config, embedding and output head of a model of transformers agree on the vocabulary.

    A model in which they do not could be cut and saved, and would not load.
    """
    said = getattr(getattr(model, "config", None), "vocab_size", None)
    if said is None or not hasattr(model, "get_input_embeddings"):
        return
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    sizes = {"config.vocab_size": said, "the embedding": table.weight.shape[0]}
    if isinstance(head, nn.Linear):
        sizes["the output head"] = head.weight.shape[0]
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{where} {size}" for where, size in sizes.items())
        raise ModelError(
            f"{type(model).__name__}: sizes of the vocabulary differ ({found}); make them one with "
            "model.resize_token_embeddings(N)"
        )


def _split(module: Any) -> str:
    if type(module).__name__ == "FullyShardedDataParallel":
        return "FSDP has split its weights; prune the model before it is wrapped"
    if hasattr(module, "_hf_hook"):
        return (
            "accelerate moves its weights; load the model with sspruner.load(..., offload=FOLDER or device_map='auto')"
        )
    return ""


def _quantised(module: Any) -> str:
    kind = type(module)
    if kind.__module__.startswith(QUANTISERS) or hasattr(module, "quantization_scheme"):
        return f"{kind.__name__} is quantised"
    return f"{kind.__name__} has packed weights" if isinstance(getattr(module, "qweight", None), torch.Tensor) else ""


def _quantised_tensor(leaf: str, tensor: torch.Tensor) -> str:
    kind = type(tensor.data)
    if kind.__module__.startswith(QUANTISERS) or tensor.is_quantized:
        return f"{kind.__name__} is quantised"
    if (isinstance(tensor, nn.Parameter) or "weight" in leaf) and tensor.dtype not in FLOATS:
        return f"a weight of type {str(tensor.dtype).removeprefix('torch.')} is quantised"
    return ""
