"""Measure what zeros in linear layers save: bytes on disk, and time.

Magnitude masks of half and 70 % of the linear layers, but for the head, which is tied to the embedding; which weights
are zero makes no difference to either. Speed: a forward with the zeros in dense tensors, and with the linear layers as
products with CSR tensors of torch.sparse, against the dense model.
"""

from __future__ import annotations

import copy
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Made, Subject, in_turns, random_tokens, span, table
from safetensors.torch import save_file
from torch import nn

import sspruner
from sspruner.benchmarking.statistics import median_interval

SPARSITIES, BATCH = (0.5, 0.7), (8, 256)  # BATCH: tokens of a forward that is timed
KINDS = ("as `sspruner.save` writes it", "values and a bit each", "CSR of torch")


def linear(model: Any) -> dict[str, nn.Linear]:
    """Return the linear layers that pruning may touch, by name."""
    head = model.get_output_embeddings()
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def file_sizes(model: Any) -> list[int]:
    """Return the bytes of a model's files: its checkpoint, values that are not zero and a bit for each, and CSR."""
    names, tensors = {f"{name}.weight" for name in linear(model)}, {n: p.detach() for n, p in model.named_parameters()}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("saved/model.safetensors", "packed.safetensors", "csr.pt")]
        sspruner.save(model, files[0].parent)
        packed = {name: value for name, value in tensors.items() if name not in names}
        for name in names:
            bits = np.packbits((tensors[name] != 0).numpy().reshape(-1))
            packed |= {f"{name}.values": tensors[name][tensors[name] != 0], f"{name}.bits": torch.from_numpy(bits)}
        save_file(packed, files[1])
        torch.save({n: value.to_sparse_csr() if n in names else value for n, value in tensors.items()}, files[2])
        return [file.stat().st_size for file in files]


class Sparse(nn.Module):
    """A linear layer without bias, by torch's product of a CSR tensor with a dense one."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach().to_sparse_csr(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product. x: (..., in)."""
        return torch.sparse.mm(self.weight, x.flatten(0, -2).T).T.unflatten(0, x.shape[:-1])


def with_sparse(model: Any) -> Any:
    """Return a copy whose linear layers are Sparse."""
    made = copy.deepcopy(model)
    for name, layer in linear(made).items():
        made.set_submodule(name, Sparse(layer))
    return made


@torch.no_grad()
def speeds(models: dict[str, Any], repeats: int) -> list[list[str]]:
    """Return how many times as fast as dense each model is: a forward, and in_proj alone, of many tokens and of one."""
    config = models["dense"].config
    ids, layers = random_tokens(*BATCH, config.vocab_size), {n: m.backbone.layers[0].mixer for n, m in models.items()}
    many = torch.randn(ids.numel(), config.hidden_size, generator=torch.Generator().manual_seed(0))
    jobs: dict[str, tuple[Any, int, int]] = {  # what -> job of a model, times in a turn, tokens
        "forward, {} x {} tokens".format(*BATCH): (lambda n: models[n](input_ids=ids, use_cache=False), 1, len(many)),
        f"in_proj alone, {len(many):,} tokens": (lambda n: layers[n].in_proj(many), 10, len(many)),
        "in_proj alone, 1 token": (lambda n: layers[n].in_proj(many[:1]), 300, 1),
    }
    rows = []
    for what, (job, times, tokens) in jobs.items():
        turns = {
            name: partial(lambda name, job, times: [job(name) for _ in range(times)], name, job, times)
            for name in models
        }
        taken = in_turns(turns, repeats)
        per_second = median_interval([tokens * times / s for s in taken["dense"]])[0]
        ratios = [median_interval([a / b for a, b in zip(taken["dense"], s, strict=True)]) for s in taken.values()]
        rows.append([what, f"{per_second:,.0f}", *map(span, ratios[1:])])
    return rows


def tables(s: Any) -> Made:
    """Return sizes and speed. Settings: repeats."""
    subject = Subject("mamba2-books-4m", s.data)
    models = {"dense": subject.model} | {f"{part:.0%}": copy.deepcopy(subject.model) for part in SPARSITIES}
    for part in SPARSITIES:
        sspruner.prune(models[f"{part:.0%}"], "magnitude", axis="weight", sparsity=part)
    rows, dense = [], list[int]()
    for label, model in models.items():
        zeros = sum(int((m.weight == 0).sum()) for m in linear(model).values())
        counts = sum(m.weight.numel() for m in linear(model).values()), sum(p.numel() for p in model.parameters())
        sizes = [
            size for dtype in (torch.float32, torch.bfloat16) for size in file_sizes(copy.deepcopy(model).to(dtype))
        ]
        dense = dense or [sizes[0]] * 3 + [sizes[3]] * 3
        cells = [f"{size / 1e6:.2f} ({size / whole:.2f})" for size, whole in zip(sizes, dense, strict=True)]
        rows.append([label, "{:.1%} ({:.1%})".format(*(zeros / count for count in counts)), *cells])
    head = ["model", "zeros in linear layers (in all)", *[f"{kind}, {d}" for d in ("fp32", "bf16") for kind in KINDS]]
    text = table("Size on disk, MB (of the dense file)", head, rows)
    variants = {name if name == "dense" else f"{name}, zeros": model for name, model in models.items()}
    variants |= {f"{part:.0%}, CSR": with_sparse(models[f"{part:.0%}"]) for part in SPARSITIES}
    head = ["what", "dense, tokens per second", *[*variants][1:]]
    text += "\n" + table("Speed: times as fast as dense, median (95 % interval)", head, speeds(variants, s.repeats))
    return [text], f"seed 0; {s.repeats} repeats of times"
