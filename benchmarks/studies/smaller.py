"""Cuts of a model that remembers, with 64 states, beside smaller dense ones that were trained as it was.

The smaller models (studies/train_recall.py) were trained with the same number of steps; each stands under the cut that
leaves as many states as it has. The model is masked; a mask equals its slice (sspruner.surgery.proof).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import Made, progress

import sspruner
from studies.recall import observed

SCORERS = ["ghost", "balanced", "taylor", "magnitude", "random"]
LARGE, SMALLER = 64, {32: 0.5, 16: 0.75}  # states of the model; of smaller ones -> the cut of the same size


def tables(s: Any) -> Made:
    """Return a table for each smaller model."""
    found = []
    for states, sparsity in SMALLER.items():
        model, small = (sspruner.load(Path(s.folder) / f"recall-{n}", dtype="float32")[0] for n in (LARGE, states))
        cells: dict[str, Any] = {"sparsities": (sparsity,), "metrics": ("recall",)}
        made = sspruner.compare(model, SCORERS, **cells, calibration=observed(model), baseline=small)
        found.append(made.named(f"recall-{LARGE}", "", f"recall-{states}").to_markdown())
        progress(f"recall: beside {states} states")
    return "\n".join(found), "seed 0", None
