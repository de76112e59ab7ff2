"""Accuracy on associative recall by scorer and states kept, of a model whose state is full (studies/train_recall.py).

Calibration and test are sequences of the training's kind that neither it nor each other saw. The model is masked; a
mask equals its slice (sspruner.surgery.proof).
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from common import Made, progress, table

import sspruner
from sspruner.evaluation.recall import recall, sequences

KEPT = (0.75, 0.5, 0.375, 0.25, 0.125)  # fractions of the states
SEEDS = (0, 1, 2)  # of the random scorer
CALIBRATION_SEQUENCES, HELD_OUT, CALIBRATION_SEED = 64, 2, 2_000_000
TEST_SEQUENCES, TEST_SEED = 512, 1_000_000
SCORERS = ["ghost", "balanced", "taylor", "magnitude", "random"]
LARGE, SMALLER = 64, {32: 0.5, 16: 0.75}  # states of the model; of smaller ones -> the cut of the same size
ROWS: dict[str, dict[str, Any]] = {  # label -> fields of a recipe
    "random": {"scorer": "random"},
    "magnitude": {"scorer": "magnitude"},
    "taylor": {"scorer": "taylor"},
    "rrqr": {"scorer": "rrqr"},
    "ghost": {"scorer": "ghost"},
    "ghost, output": {"scorer": "ghost", "options": {"variant": "output"}},
    "balanced, no weights": {"scorer": "balanced", "options": {"weights": "none"}},
    "balanced, output": {"scorer": "balanced", "options": {"weights": "output"}},
}
REFIT = ("random", "magnitude", "taylor", "ghost", "balanced")
ROWS |= {f"{name}, refit": {"scorer": name, "refit": "output"} for name in REFIT}


def tasks(model: Any, count: int, seed: int) -> torch.Tensor:
    """Return sequences of the size that the model was trained on: int64 (count, T)."""
    generator = torch.Generator().manual_seed(seed)
    return sequences(count, model.config.recall_pairs, model.config.vocab_size, generator)


def observed(model: Any) -> sspruner.Calibration:
    """Return the sequences that scorers see."""
    made = tasks(model, CALIBRATION_SEQUENCES + HELD_OUT, CALIBRATION_SEED)
    return sspruner.calibration(made, model, samples=CALIBRATION_SEQUENCES, held_out=HELD_OUT)


def summary(right: torch.Tensor) -> tuple[float, float]:
    """Return the mean and its standard error over sequences. right: (sequences,)."""
    return float(right.mean()), float(right.std()) / math.sqrt(len(right))


def smaller(folder: Path) -> Made:
    """Return a table for each smaller dense model, under the cut that leaves as many states as it has.

    They were trained as the large model was, with the same number of steps.
    """
    found = []
    for states, sparsity in SMALLER.items():
        model, small = (sspruner.load(folder / f"recall-{n}", dtype="float32")[0] for n in (LARGE, states))
        cells: dict[str, Any] = {"sparsities": (sparsity,), "metrics": ("recall",)}
        made = sspruner.compare(model, SCORERS, **cells, calibration=observed(model), baseline=small)
        found.append(made.named(f"recall-{LARGE}", "", f"recall-{states}").to_markdown())
        progress(f"recall: beside {states} states")
    return "\n".join(found), "seed 0", None


def tables(s: Any) -> Made:
    """Return accuracy by row and states kept; of the random scorer the mean over seeds.

    Settings: model, rows; or the folder of the models of `smaller`.
    """
    if hasattr(s, "folder"):
        return smaller(Path(s.folder))
    model, _ = sspruner.load(s.model, dtype="float32")
    states, pairs = model.config.state_size, model.config.recall_pairs
    data, test = observed(model), tasks(model, TEST_SEQUENCES, TEST_SEED)
    dense = summary(recall(model, test)[0])
    found: dict[str, dict[int, tuple[float, float]]] = {label: {} for label in getattr(s, "rows", ROWS)}
    for label, by_kept in found.items():
        for keep in [int(states * fraction) for fraction in KEPT]:
            runs = []
            for seed in SEEDS if ROWS[label]["scorer"] == "random" else SEEDS[:1]:
                cut = copy.deepcopy(model)
                sspruner.prune(cut, **ROWS[label], keep=keep, mode="mask", calibration=data, seed=seed)
                runs.append(recall(cut, test)[0])
            by_kept[keep] = summary(torch.stack(runs).mean(0))
            progress(f"{label}, {keep} states: {by_kept[keep][0]:.3f}")
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
    numbers = {"states": states, "pairs": pairs, "dense": dense, "accuracy": found}
    return table(title, ["scorer", *map(str, next(iter(found.values())))], rows), note, numbers
