"""What an evaluation found: rows with intervals, as JSON, and held against limits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from sspruner.errors import InputError
from sspruner.evaluation.paired import Interval
from sspruner.files.provenance import versions


@dataclass(frozen=True)
class Row:
    """One metric of a model, of the model that it is compared with, and the change: a `ratio` of perplexities, a
    `difference` of everything else, from the same windows or items of both. None without such a model."""

    metric: str
    value: Interval
    against: Interval | None
    change: Interval | None
    kind: str
    items: int

    def as_json(self) -> dict[str, Any]:
        """The change is under the name of its kind."""
        change = {"ratio": None, "difference": None, self.kind: _list(self.change)}
        return {"metric": self.metric, "value": _list(self.value), "against": _list(self.against), **change,
                "items": self.items}  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured. rows: windows of text, passages, sequences or a task's items; by_position: tokens
    by how many the model had read before them, "0-127" and so on; by_length: windows of so many tokens, end to end."""

    model: str
    against: str | None
    protocol: dict[str, Any]
    rows: tuple[Row, ...]
    by_position: dict[str, Row]
    by_length: dict[str, Row]
    notes: tuple[str, ...]
    command: str = ""

    def __getitem__(self, metric: str) -> Row:
        return next(row for row in self.rows if row.metric == metric)

    def to_json(self) -> str:
        """As JSON: every interval is [value, low, high]; numbers that are not finite are null."""
        data = {
            "version": 1,
            "model": self.model,
            "against": self.against,
            "protocol": self.protocol,
            "rows": [row.as_json() for row in self.rows],
            "perplexity_by_position": {where: row.as_json() for where, row in self.by_position.items()},
            "perplexity_by_length": {length: row.as_json() for length, row in self.by_length.items()},
            "notes": self.notes,
            "versions": versions(),
            "command": self.command,
        }
        return json.dumps(data, indent=2, allow_nan=False) + "\n"

    def failed(self, max_ppl_increase: float | None = None, max_lambada_drop: float | None = None) -> list[str]:
        """Why this is worse than it may be, one line for each row that is; [] if it is not.

        max_ppl_increase: 0.02 is 2 %. max_lambada_drop: percentage points of accuracy. What is just reached passes;
        what is no number fails. Raises InputError if the row was not measured against another model.
        """
        lines = []
        for metric, limit in (("perplexity", max_ppl_increase), ("lambada_accuracy", max_lambada_drop)):
            if limit is None:
                continue
            change = next((row.change for row in self.rows if row.metric == metric), None)
            if change is None:
                raise InputError(f"a limit on {metric} needs this row, measured against the dense model")
            is_ratio = metric == "perplexity"
            worse, unit = (100 * (change.value - 1), "%") if is_ratio else (-100 * change.value, "points")
            allowed = 100 * limit if is_ratio else limit
            if not round(worse, 9) <= round(allowed, 9):
                word = "rises by" if is_ratio else "drops by"
                lines.append(f"{metric} {word} {worse:.3f} {unit}; at most {allowed:g} {unit} are allowed")
        return lines


def _list(interval: Interval | None) -> list[float | None] | None:
    return None if interval is None else interval.to_json()
