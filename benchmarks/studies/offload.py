"""Measure what pruning a model of 2.7 billion parameters takes when its blocks stay on disk: memory and seconds.

Random weights in the shape of Mamba2-2.7B, bf16 (5.4 GB, kept in the folder for the next time; 17 GB in all); random
tokens for calibration. Memory and time do not need trained weights. Each run is a process of its own that reports the
peak of its resident memory, as `report.json` does; half of every state goes.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from common import Made, in_fresh_process, progress, table

import sspruner
from sspruner.benchmarking.shapes import shape_model
from sspruner.files.provenance import peak_memory_bytes

SAMPLES, HELD_OUT, SEQ_LEN = 2, 1, 32


def prune(model: Path, work: Path, scorer: str) -> list[str]:
    """Prune, save, and return what that took. For a fresh process."""
    start, imported = time.perf_counter(), peak_memory_bytes()
    loaded, _ = sspruner.load(model, offload=work / "working")
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(loaded.config.vocab_size, (SAMPLES + HELD_OUT, SEQ_LEN), generator=generator)
    data = sspruner.calibration(tokens, loaded, samples=SAMPLES, held_out=HELD_OUT)
    result = sspruner.prune(loaded, scorer, sparsity=0.5, calibration=data)
    sspruner.save(result.model, work / "out", result=result)
    report, whole = result.report, time.perf_counter() - start
    sizes = (report.dense["weight_bytes"], peak_memory_bytes(), imported)
    seconds = (report.seconds["scoring"], report.seconds["evaluation and proof"], whole)
    state = " to ".join(f"{found['state_bytes'] / 1e6:.1f} MB" for found in (report.dense, report.pruned))
    return [scorer, *(f"{size / 1e9:.2f} GB" for size in sizes), *(f"{s:.0f} s" for s in seconds), state]


def tables(s: Any) -> Made:
    """Return a row for each scorer. Settings: folder (the checkpoint is there, or goes there), layers."""
    model, work, rows = Path(s.folder) / f"shape-{s.layers}", Path(s.folder) / "work", []
    if not (model / "config.json").is_file():
        progress("making the checkpoint")
        sspruner.save(shape_model("mamba2-2.7b", layers=s.layers, dtype=torch.bfloat16), model, overwrite=True)
    for scorer in ("magnitude", "ghost"):
        progress(f"pruning by {scorer}")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        rows.append(in_fresh_process(prune, model, work, scorer))
    shutil.rmtree(work)
    head = ["scorer", "weights", "peak memory", "of it after imports", "scoring", "measuring, cutting, proof"]
    head += ["with loading and saving", "state per sequence"]
    note = f"{SAMPLES} x {SEQ_LEN} calibration tokens, {HELD_OUT} x {SEQ_LEN} held out, random; seeds 0 and 1"
    return [table("A model that stays on disk", head, rows)], note
