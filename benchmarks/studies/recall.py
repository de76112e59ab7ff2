"""Accuracy on associative recall by scorer and states kept, of a model whose state is full.

    python benchmarks/train_recall.py --threads 1 --out /var/tmp/recall-64
    python benchmarks/recall.py /var/tmp/recall-64 --threads 1 --json recall.json
    python benchmarks/recall.py /var/tmp/recall-64 --threads 1 --table docs/benchmarks.md

Calibration and test are sequences of the training's kind that neither it nor each other saw. The model is masked; a
mask equals its slice (sspruner.surgery.proof). With --table the result goes into a page, between its marks.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from common import insert, progress, provenance, table
from train_recall import TEST_SEED, TEST_SEQUENCES

import sspruner
from sspruner.evaluation.recall import recall, sequences

KEPT = (0.75, 0.5, 0.375, 0.25, 0.125)  # fractions of the states
SEEDS = (0, 1, 2)  # of the random scorer
CALIBRATION_SEQUENCES, HELD_OUT, CALIBRATION_SEED = 64, 2, 2_000_000

ROWS: dict[str, dict[str, Any]] = {  # label -> arguments of sspruner.prune
    "random": {"scorer": "random"},
    "magnitude": {"scorer": "magnitude"},
    "taylor": {"scorer": "taylor"},
    "rrqr": {"scorer": "rrqr"},
    "ghost": {"scorer": "ghost"},
    "ghost, output": {"scorer": "ghost", "options": {"variant": "output"}},
    "balanced, no weights": {"scorer": "balanced", "options": {"weights": "none"}},
    "balanced, output": {"scorer": "balanced", "options": {"weights": "output"}},
}
ROWS |= {f"{label}, refit": ROWS[label] | {"refit": "output"} for label in ("random", "magnitude", "taylor", "ghost")}
ROWS["balanced, refit"] = {"scorer": "balanced", "refit": "output"}


def tasks(model: Any, count: int, seed: int) -> torch.Tensor:
    """Sequences of the size that the model was trained on: int64 (count, T)."""
    generator = torch.Generator().manual_seed(seed)
    return sequences(count, model.config.recall_pairs, model.config.vocab_size, generator)


def accuracy(model: Any, calibration: sspruner.Calibration, test: torch.Tensor, keep: int, label: str) -> torch.Tensor:
    """The fraction of right answers in each test sequence, mean over seeds if the scorer is random: (sequences,)."""
    seeds = SEEDS if ROWS[label]["scorer"] == "random" else SEEDS[:1]
    runs = []
    for seed in seeds:
        cut = copy.deepcopy(model)
        sspruner.prune(cut, keep=keep, mode="mask", calibration=calibration, seed=seed, **ROWS[label])
        runs.append(recall(cut, test)[0])
    return torch.stack(runs).mean(0)


def summary(right: torch.Tensor) -> tuple[float, float]:
    """Mean and standard error over sequences. right: (sequences,)."""
    return float(right.mean()), float(right.std()) / math.sqrt(len(right))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder that benchmarks/train_recall.py wrote")
    parser.add_argument("--keep", type=int, nargs="+", help="states; default: 75, 50, 37.5, 25 and 12.5 %% of them")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="some of the table's rows")
    parser.add_argument("--json", type=Path, help="write the numbers to this file, too")
    parser.add_argument("--table", type=Path, help="a page with the marks <!-- recall-STATES: begin --> and end")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)

    model, _ = sspruner.load(given.model, dtype="float32")
    states, pairs = model.config.state_size, model.config.recall_pairs
    keep = given.keep or [int(states * fraction) for fraction in KEPT]
    observed = tasks(model, CALIBRATION_SEQUENCES + HELD_OUT, CALIBRATION_SEED)
    calibration = sspruner.calibration(observed, model, samples=CALIBRATION_SEQUENCES, held_out=HELD_OUT)
    test = tasks(model, TEST_SEQUENCES, TEST_SEED)

    dense = summary(recall(model, test)[0])
    progress(f"dense: {dense[0]:.3f} ± {dense[1]:.3f}")
    found: dict[str, dict[int, tuple[float, float]]] = {label: {} for label in given.rows}
    for label in given.rows:
        for k in keep:
            mean, error = found[label][k] = summary(accuracy(model, calibration, test, k, label))
            progress(f"{label}, {k} states: {mean:.3f} ± {error:.3f}")

    title = (
        f"Associative recall, {pairs} pairs, Mamba2 with {states} states per head: "
        f"accuracy by states kept; dense {dense[0]:.3f} ± {dense[1]:.3f}"
    )
    rows = [[label, *[f"{mean:.3f} ± {error:.3f}" for mean, error in by_k.values()]] for label, by_k in found.items()]
    note = (
        f"{TEST_SEQUENCES} test sequences of {test.shape[1]} tokens, ± standard error over them; "
        f"{CALIBRATION_SEQUENCES} sequences observed; seeds {TEST_SEED} (test), {CALIBRATION_SEED} (calibration), "
        f"{SEEDS} (random: mean of these; ± is without their spread)"
    )
    text = table(title, ["scorer", *map(str, keep)], rows) + "\n\n" + provenance(note)
    print(text)
    if given.table:
        insert(given.table, f"recall-{states}", text)
    if given.json:
        numbers = {"states": states, "pairs": pairs, "dense": dense, "accuracy": found}
        given.json.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
