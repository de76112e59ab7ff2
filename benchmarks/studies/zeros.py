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
from common import Made, Subject, forward, in_turns, random_tokens, span, table
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


def sparse_product(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return x W^T by torch's product of a CSR tensor with a dense one. x: (..., in)."""
    return torch.sparse.mm(weight, x.flatten(0, -2).T).T.reshape(*x.shape[:-1], -1)  # type: ignore[no-any-return]


def with_sparse(model: Any) -> Any:
    """Return a copy whose linear layers multiply by CSR tensors."""
    made = copy.deepcopy(model)
    for layer in linear(made).values():
        layer.forward = partial(sparse_product, layer.weight.detach().to_sparse_csr())  # type: ignore[method-assign]
    return made


def tables(s: Any) -> Made:
    """Return sizes and speed. Settings: repeats."""
    subject, rows = Subject("mamba2-books-4m", s.data), []
    models, dense = {"dense": subject.model}, file_sizes(subject.model)[0]
    for part in SPARSITIES:
        models[f"{part:.0%}"] = copy.deepcopy(subject.model)
        sspruner.prune(models[f"{part:.0%}"], "magnitude", axis="weight", sparsity=part)
    for label, model in models.items():
        weights = [layer.weight for layer in linear(model).values()]
        zeros = sum(int((weight == 0).sum()) for weight in weights)
        counts = [sum(p.numel() for p in some) for some in (weights, model.parameters())]
        cells = [f"{size / 1e6:.2f} ({size / dense:.2f})" for size in file_sizes(model)]
        rows.append([label, "{:.1%} ({:.1%})".format(*(zeros / count for count in counts)), *cells])
    head = ["model", "zeros in linear layers (in all)", *KINDS]
    made = [table("Size on disk, MB (of the dense file), fp32", head, rows)]
    variants = {f"{label}, zeros" if label != "dense" else label: model for label, model in models.items()}
    variants |= {f"{label}, CSR": with_sparse(model) for label, model in models.items() if label != "dense"}
    ids = random_tokens(*BATCH, len(subject.tokenizer))
    took = in_turns({label: partial(forward, model, ids) for label, model in variants.items()}, s.repeats)
    ratios = [median_interval([a / b for a, b in zip(took["dense"], times, strict=True)]) for times in took.values()]
    per_second = ids.numel() / median_interval(took["dense"])[0]
    rows = [["forward, {} x {} tokens".format(*BATCH), f"{per_second:,.0f}", *map(span, ratios[1:])]]
    head = ["what", "dense, tokens per second", *[*variants][1:]]
    made.append(table("Speed: times as fast as dense, median (95 % interval)", head, rows))
    return made, f"seed 0; {s.repeats} repeats of times"
