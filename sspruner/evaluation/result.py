"""What an evaluation found: rows with intervals, as JSON, and held against limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sspruner.errors import InputError
from sspruner.evaluation.paired import Interval
from sspruner.files import strict_json
from sspruner.files.fields import integer, items, table, text, versioned
from sspruner.files.output import atomic_file
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

    def to_json(self) -> dict[str, Any]:
        """Return its fields; the change is under the name of its kind."""
        against, change = (None if i is None else i.to_json() for i in (self.against, self.change))
        return {"metric": self.metric, "value": self.value.to_json(), "against": against,
                "ratio": None, "difference": None, self.kind: change, "items": self.items}  # fmt: skip

    @classmethod
    def from_json(cls, data: Any) -> Row:
        """Inverse of `to_json`, but for the kind of a change that is not there: it reads as a difference.

        Raises KeyError, TypeError or ValueError for what that did not write.
        """
        fields = table(data)
        kind = "difference" if fields["ratio"] is None else "ratio"
        against, change = (None if i is None else Interval.from_json(i) for i in (fields["against"], fields[kind]))
        value = Interval.from_json(fields["value"])
        return cls(text(fields["metric"]), value, against, change, kind, integer(fields["items"]))


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
    versions: dict[str, str] = field(default_factory=versions)

    def __getitem__(self, metric: str) -> Row:
        return next(row for row in self.rows if row.metric == metric)

    def to_json(self) -> str:
        """Return the content of evaluation.json: every interval is [value, low, high]."""
        data = {
            "version": 1,
            "model": self.model,
            "against": self.against,
            "protocol": self.protocol,
            "rows": [row.to_json() for row in self.rows],
            "perplexity_by_position": {where: row.to_json() for where, row in self.by_position.items()},
            "perplexity_by_length": {length: row.to_json() for length, row in self.by_length.items()},
            "notes": self.notes,
            "versions": self.versions,
            "command": self.command,
        }
        return strict_json.dumps(data, indent=2) + "\n"

    @classmethod
    def from_json(cls, data: Any) -> Evaluation:
        """Inverse of `to_json`, from its text or what `strict_json.loads` makes of it; other keys are passed over.

        Raises KeyError, TypeError or ValueError for what that did not write.
        """
        fields = versioned(strict_json.loads(data) if isinstance(data, str) else data)
        buckets = [table(fields[f"perplexity_by_{what}"]) for what in ("position", "length")]
        by_position, by_length = ({where: Row.from_json(row) for where, row in rows.items()} for rows in buckets)
        return cls(
            model=text(fields["model"]),
            against=None if fields["against"] is None else text(fields["against"]),
            protocol=table(fields["protocol"]),
            rows=tuple(map(Row.from_json, items(fields["rows"]))),
            by_position=by_position,
            by_length=by_length,
            notes=tuple(map(text, items(fields["notes"]))),
            command=text(fields["command"]),
            versions=table(fields["versions"]),
        )

    def save(self, path: str | Path) -> None:
        """Write evaluation.json, atomically."""
        with atomic_file(path) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8", errors="backslashreplace")

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Inverse of `save`. Raises InputError for a file that `save` did not write."""
        return strict_json.load("evaluation", path, cls.from_json)

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
