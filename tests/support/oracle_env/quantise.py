"""Quantise a checkpoint, save it, load it again, and compare: `quantise.py CUT DENSE TOKENS SCHEME OUT` prints JSON.

Runs in .venv-quant, without sspruner. TOKENS: a JSON file of token ids, (sequences, T). KL is in nats per token: of the
quantised model to the cut one, and of the cut and the quantised one to the dense one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

SCHEMES = ("torchao-int8", "torchao-int4", "compressed-int8", "compressed-int4")


def quantised(folder: str, scheme: str) -> Any:
    """Return the model of a folder with quantised weights of its linear layers; embeddings and head stay."""
    if scheme.startswith("torchao"):
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
        from transformers import TorchAoConfig

        # Int4WeightOnlyConfig has no kernel for a CPU in torchao 0.18; this one has the same grid of values.
        int4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
        how = TorchAoConfig(int4 if scheme.endswith("4") else Int8WeightOnlyConfig())
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=how)
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    scheme = "W4A16" if scheme.endswith("4") else "W8A16"
    oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"]))
    return model


def loaded(folder: str, scheme: str) -> Any:
    """Load what was saved, with its own method; compressed tensors are expanded, since Mamba2's code needs `weight`."""
    if scheme.startswith("torchao"):
        return AutoModelForCausalLM.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=CompressedTensorsConfig(dequantize=True))


@torch.no_grad()
def log_probabilities(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return fp32 log-probabilities after every token: (sequences, T, vocabulary)."""
    rows = [model(input_ids=row[None], use_cache=False).logits.float().log_softmax(-1) for row in tokens]
    return torch.cat(rows)


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    """Return KL(p || q), nats per token, of log-probabilities."""
    return float((p.exp() * (p - q)).sum(-1).double().mean())


def weight_bytes(folder: str) -> int:
    """Return the bytes of the weight files in a folder."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def main(cut: str, dense: str, tokens: str, scheme: str, out: str) -> None:
    """Quantise, save, load, measure, and print the result as one line of JSON."""
    torch.set_num_threads(1)
    ids = torch.tensor(json.loads(Path(tokens).read_text(encoding="utf-8")))
    of_dense, of_cut = (
        log_probabilities(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), ids)
        for folder in (dense, cut)
    )
    model = quantised(cut, scheme)
    in_memory = log_probabilities(model, ids) if scheme.startswith("torchao") else None
    model.save_pretrained(out, **({} if scheme.startswith("torchao") else {"save_compressed": True}))
    read = log_probabilities(loaded(out, scheme), ids)
    found = {
        "saved_is_in_memory": None if in_memory is None else bool(torch.equal(in_memory, read)),
        "kl_of_cut_to_dense": kl(of_dense, of_cut),
        "kl_of_quantised_to_cut": kl(of_cut, read),
        "kl_of_quantised_to_dense": kl(of_dense, read),
        "bytes": [weight_bytes(folder) for folder in (dense, cut, out)],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
