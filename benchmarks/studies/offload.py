"""What pruning a model of 2.7 billion parameters takes when its blocks stay on disk: memory and seconds.

Random weights in the shape of Mamba2-2.7B, bf16, made here layer by layer (5.4 GB, kept in the folder for the next
time; 17 GB are needed in all); random tokens for calibration. Memory and time do not need trained weights. Each run is
a process of its own that reports the peak of its resident memory, as `report.json` does; half of every state goes.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from common import Made, in_fresh_process, progress, table
from safetensors.torch import save_file

import sspruner
from sspruner.benchmarking.shapes import shape_config
from sspruner.files.provenance import peak_memory_bytes

SAMPLES, HELD_OUT, SEQ_LEN = 2, 1, 32


def make(folder: Path, layers: int) -> None:
    """Write the checkpoint: one shard for each layer, so that never more than one is in memory."""
    from transformers import AutoModelForCausalLM

    config = shape_config("mamba2-2.7b", layers=layers)
    config.dtype, config.architectures = torch.bfloat16, ["Mamba2ForCausalLM"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shards: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        parts = name.split(".")
        shards.setdefault(parts[2] if parts[1] == "layers" else "rest", []).append(name)
    files, generator = {}, torch.Generator().manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number, names in enumerate(shards.values(), start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        progress(f"making {file}")
        tensors = {n: _values(n, model.get_parameter(n).shape, generator).bfloat16() for n in names}
        save_file(tensors, folder / file, {"format": "pt"})
        files |= dict.fromkeys(names, file)
    index = json.dumps({"metadata": {}, "weight_map": files})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    config.save_pretrained(folder)  # last: a folder without it is not complete


def _values(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Values of the size that a trained model's have."""
    leaf = name.rpartition(".")[2]
    if leaf == "A_log":
        return torch.log(1 + 15 * torch.rand(shape, generator=generator))
    if leaf == "dt_bias":
        return torch.rand(shape, generator=generator) * 4 - 6  # softplus: 0.0025 to 0.13
    if leaf == "D" or "norm" in name:
        return torch.ones(shape)
    return torch.randn(shape, generator=generator) * (0.3 if "conv1d" in name else 0.02)


def prune(model: Path, work: Path, scorer: str) -> list[str]:
    """Prune, save, and return what that took. For a fresh process."""
    start, imported = time.perf_counter(), peak_memory_bytes()
    generator = torch.Generator().manual_seed(1)
    loaded, _ = sspruner.load(model, offload=work / "working")
    tokens = torch.randint(loaded.config.vocab_size, (SAMPLES + HELD_OUT, SEQ_LEN), generator=generator)
    data = sspruner.calibration(tokens, loaded, samples=SAMPLES, held_out=HELD_OUT)
    result = sspruner.prune(loaded, scorer, sparsity=0.5, calibration=data)
    sspruner.save(result.model, work / "out", result=result)
    report, whole = result.report, time.perf_counter() - start
    sizes = (report.dense["weight_bytes"], peak_memory_bytes() or 0, imported or 0)
    seconds = (report.seconds["scoring"], report.seconds["evaluation and proof"], whole)
    state = " to ".join(f"{found['state_bytes'] / 1e6:.1f} MB" for found in (report.dense, report.pruned))
    return [scorer, *(f"{size / 1e9:.2f} GB" for size in sizes), *(f"{s:.0f} s" for s in seconds), state]


def tables(s: Any) -> Made:
    """Return a row for each scorer. Settings: folder (the checkpoint is there, or goes there), layers."""
    model, work, rows = Path(s.folder) / f"shape-{s.layers}", Path(s.folder) / "work", []
    if not (model / "config.json").is_file():
        make(model, s.layers)
    for scorer in ("magnitude", "ghost"):
        progress(f"pruning by {scorer}")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        rows.append(in_fresh_process(prune, model, work, scorer))
    shutil.rmtree(work)
    head = ["scorer", "weights", "peak memory", "of it after imports", "scoring", "measuring, cutting, proof"]
    head += ["with loading and saving", "state per sequence"]
    note = f"{SAMPLES} x {SEQ_LEN} calibration tokens, {HELD_OUT} x {SEQ_LEN} held out, random; seeds 0 and 1"
    return table("A model that stays on disk", head, rows), note, None
