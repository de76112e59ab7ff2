"""Perplexity of the reference models on books that they never saw, as shipped (bf16) and run in fp32; dense and cut.

The first windows of 256 tokens of each file, each window alone, its first token as context only. The cut: three
quarters of the state by GHOST, on windows of books-val.txt drawn with a seed.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from common import WINDOWS_PER_BATCH, Made, Subject, progress, table

import sspruner
from sspruner.evaluation.damage import mean_loss

SEQ_LEN, FILES, SPARSITY, CALIBRATION = 256, ("books-val.txt", "books-test.txt"), 0.75, 8


def first_windows(file: Path, tokenizer: Any, count: int = 320) -> torch.Tensor:
    """Return the first non-overlapping windows of a text: int64 (count, SEQ_LEN)."""
    ids = tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: count * SEQ_LEN]).view(count, SEQ_LEN)


def perplexity(model: Any, windows: torch.Tensor) -> float:
    """Return the perplexity over windows: int64 (W, T)."""
    batches = [(part, torch.ones_like(part, dtype=torch.bool)) for part in windows.split(WINDOWS_PER_BATCH)]
    return math.exp(mean_loss(model, batches))


def tables(s: Any) -> Made:
    """Return a row for each model and dtype. Settings: models (names or folders), windows."""
    rows = []
    for name in s.models:
        for dtype in ("bfloat16", "float32"):
            subject, row = Subject(name, s.data, dtype), [f"{name}, {dtype}"]
            texts = [first_windows(s.data / file, subject.tokenizer, s.windows) for file in FILES]
            row += [f"{perplexity(subject.model, windows):.2f}" for windows in texts]
            data = subject.text(FILES[0], CALIBRATION)
            sspruner.prune(subject.model, "ghost", sparsity=SPARSITY, mode="mask", calibration=data)
            rows.append([*row, f"{perplexity(subject.model, texts[1]):.2f}"])
            progress(" | ".join(rows[-1]))
    head = ["run in", *FILES, f"{FILES[1]}, {SPARSITY:.0%} cut by ghost"]
    title = f"Perplexity, first {s.windows * SEQ_LEN:,} tokens"
    return table(title, head, rows), f"seed 0; {CALIBRATION} x {SEQ_LEN} tokens observed for the cut", None
