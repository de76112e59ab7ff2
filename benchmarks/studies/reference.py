"""Perplexity of the reference models on books that they never saw, as shipped (bf16) and run in fp32; dense and cut.

    python benchmarks/reference.py --data ../shared/data

Protocol: the first 320 windows of 256 tokens of each file, each window alone, its first token as context only. The cut:
three quarters of the state by GHOST, on windows of books-val.txt drawn with a seed.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from common import MODELS, books, progress, provenance, table

import sspruner
from sspruner.evaluation.damage import log_probabilities

WINDOWS, SEQ_LEN, WINDOWS_PER_BATCH = 320, 256, 8
FILES = ("books-val.txt", "books-test.txt")
SPARSITY, CALIBRATION, SEED = 0.75, 8, 0


def first_windows(file: Path, tokenizer: Any) -> torch.Tensor:
    """The first WINDOWS non-overlapping windows of a text: int64 (WINDOWS, SEQ_LEN)."""
    ids = tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: WINDOWS * SEQ_LEN]).view(WINDOWS, SEQ_LEN)


@torch.no_grad()
def perplexity(model: Any, windows: torch.Tensor) -> float:
    """windows: int64 (W, T)."""
    total = 0.0
    for batch in windows.split(WINDOWS_PER_BATCH):
        logp = log_probabilities(model, batch, torch.ones_like(batch))  # (b, T-1, V)
        total -= float(logp.gather(-1, batch[:, 1:, None]).double().sum())
    return math.exp(total / windows[:, 1:].numel())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, help="reference models, or folders; default: all three")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with books-*.txt")
    parser.add_argument("--windows", type=int, default=WINDOWS, help=f"of {SEQ_LEN} tokens")
    given = parser.parse_args()
    rows = []
    for name in given.models:
        for dtype in ("bfloat16", "float32"):
            model, tokenizer = sspruner.load(name, dtype=dtype)
            row = [f"{name}, {dtype}"]
            for file in FILES:
                windows = first_windows(given.data / file, tokenizer)[: given.windows]
                row.append(f"{perplexity(model, windows):.2f}")
                progress(f"{row[0]}, {file}: {row[-1]}")
            seen = books(model, tokenizer, given.data / FILES[0], CALIBRATION, SEQ_LEN, SEED)
            sspruner.prune(model, "ghost", sparsity=SPARSITY, mode="mask", calibration=seen)
            row.append(f"{perplexity(model, windows):.2f}")
            rows.append(row)
    print(
        table(
            f"Perplexity, first {given.windows * SEQ_LEN:,} tokens",
            ["run in", *FILES, f"{FILES[1]}, {SPARSITY:.0%} cut by ghost"],
            rows,
        )
    )
    print("\n" + provenance(f"seed {SEED}; {CALIBRATION} x {SEQ_LEN} tokens observed for the cut"))


if __name__ == "__main__":
    main()
