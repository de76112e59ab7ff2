"""`sspruner.compare` on a language model, and on a model that remembers, beside smaller dense ones of its kind.

    python benchmarks/compare.py --data ../shared/data
    for n in 64 32 16; do python benchmarks/train_recall.py --state $n --out /var/tmp/recall-$n; done
    python benchmarks/compare.py --recall /var/tmp --data ../shared/data

The smaller models were trained as the large one was, with the same number of steps; each stands under the cut that
leaves as many states as it has. The model is masked; a mask equals its slice (sspruner.surgery.proof).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from common import deliver, options, progress, provenance
from recall import CALIBRATION_SEED, CALIBRATION_SEQUENCES, HELD_OUT, tasks

import sspruner
from sspruner.evaluation.last_word import passages

SCORERS, SPARSITIES = ["ghost", "balanced", "taylor", "magnitude", "random"], (0.25, 0.5, 0.75, 0.9)
WINDOWS, REPORTED, PASSAGES, SEED = 32, 32, 200, 0
LARGE, SMALLER = 64, {32: 0.5, 16: 0.75}  # states of the model that remembers; of smaller ones -> cut of the same size


def language(given: Any) -> sspruner.Comparison:
    """The reference model on books: calibrated on a part of books-val, measured on another."""
    model, tokenizer = sspruner.load("mamba2-books-4m", dtype="float32")
    windows, reported, asked = (4, 4, 4) if given.quick else (WINDOWS, REPORTED, PASSAGES)
    data = sspruner.calibration(
        given.data / "books-val.txt", model, tokenizer, samples=windows, seq_len=256, held_out=reported, seed=SEED
    )
    with (given.data / "lambada-test.jsonl").open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    return sspruner.compare(
        model,
        SCORERS,
        sparsities=SPARSITIES,
        metrics=("ppl", "kl", "lambada"),
        calibration=data,
        passages=passages(tokenizer, texts, asked, SEED),
        seed=SEED,
        on_row=lambda found: progress(f"language: {', '.join(found.cells)}"),
    )


def remembering(folder: Path) -> list[sspruner.Comparison]:
    """Cuts of the model with LARGE states, with each smaller one beside the cut of its size."""
    found = []
    for states, sparsity in SMALLER.items():
        model, _ = sspruner.load(folder / f"recall-{LARGE}", dtype="float32")
        small, _ = sspruner.load(folder / f"recall-{states}", dtype="float32")
        observed = tasks(model, CALIBRATION_SEQUENCES + HELD_OUT, CALIBRATION_SEED)
        data = sspruner.calibration(observed, model, samples=CALIBRATION_SEQUENCES, held_out=HELD_OUT)
        made = sspruner.compare(
            model, SCORERS, sparsities=(sparsity,), metrics=("recall",), calibration=data, baseline=small, seed=SEED
        )
        found.append(made.named(f"recall-{LARGE}", "", f"recall-{states}"))
        progress(f"recall: beside {states} states")
    return found


def main() -> None:
    parser = options(__doc__, "compare.py")
    parser.add_argument("--recall", type=Path, help="folder with recall-64, recall-32 and recall-16 of train_recall.py")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    found = [language(given), *(remembering(given.recall) if given.recall else [])]
    text = "\n".join(one.to_markdown() for one in found) + "\n" + provenance(f"seed {SEED}")
    deliver(given, "compare.py", text, [json.loads(one.to_json()) for one in found])


if __name__ == "__main__":
    main()
