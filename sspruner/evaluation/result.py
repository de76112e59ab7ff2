"""Result of an evaluation: rows with intervals, read and written as JSON, and checked against limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sspruner.errors import InputError
from sspruner.evaluation.paired import Interval
from sspruner.files import strict_json
from sspruner.files.fields import integer, items, table, text, versioned
from sspruner.files.output import write_file
from sspruner.files.provenance import versions


@dataclass(frozen=True)
class Row:
    """One metric of a model, of the model it is compared with, and the change from the same windows or items.

    kind: "ratio" for perplexities, "difference" for all others. against, change: None without another model.
    """

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
        """Parse a row. A missing change reads as a difference, whatever its kind was.

        Raises KeyError, TypeError or ValueError for anything that `to_json` does not write.
        """
        fields = table(data)
        kind = "difference" if fields["ratio"] is None else "ratio"
        against, change = (None if i is None else Interval.from_json(i) for i in (fields["against"], fields[kind]))
        value = Interval.from_json(fields["value"])
        return cls(text(fields["metric"]), value, against, change, kind, integer(fields["items"]))


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    rows: items are windows of text, passages, sequences, or items of a task. by_position: tokens by the number of
    tokens read before them, "0-127" and so on. by_length: windows of this many tokens, end to end. by_state: metrics of
    the decoded text, with states stored as `protocol["state"]` says, against fp32 states.
    """

    model: str
    against: str | None
    protocol: dict[str, Any]
    rows: tuple[Row, ...]
    by_position: dict[str, Row]
    by_length: dict[str, Row]
    notes: tuple[str, ...]
    by_state: dict[str, Row] = field(default_factory=dict)
    command: str = ""
    versions: dict[str, str] = field(default_factory=versions)

    def __getitem__(self, metric: str) -> Row:
        return next(row for row in self.rows if row.metric == metric)

    def to_json(self) -> str:
        """Return the content of evaluation.json; every interval is [value, low, high]."""
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
        if self.by_state:
            data["stored_state"] = {metric: row.to_json() for metric, row in self.by_state.items()}
        return strict_json.dumps(data, indent=2) + "\n"

    @classmethod
    def from_json(cls, data: Any) -> Evaluation:
        """Parse an evaluation, from its text or from the parsed JSON; unknown keys are ignored.

        Raises KeyError, TypeError or ValueError for anything that `to_json` does not write.
        """
        fields = versioned(strict_json.loads(data) if isinstance(data, str) else data)
        buckets = [table(fields[f"perplexity_by_{what}"]) for what in ("position", "length")]
        buckets.append(table(fields.get("stored_state", {})))  # not in files of earlier versions
        by_position, by_length, by_state = (
            {where: Row.from_json(row) for where, row in rows.items()} for rows in buckets
        )
        return cls(
            model=text(fields["model"]),
            against=None if fields["against"] is None else text(fields["against"]),
            protocol=table(fields["protocol"]),
            rows=tuple(map(Row.from_json, items(fields["rows"]))),
            by_position=by_position,
            by_length=by_length,
            notes=tuple(map(text, items(fields["notes"]))),
            by_state=by_state,
            command=text(fields["command"]),
            versions=table(fields["versions"]),
        )

    def save(self, path: str | Path) -> None:
        """Write evaluation.json atomically."""
        write_file(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read an evaluation. Raises InputError for a file that `save` did not write."""
        return strict_json.load("evaluation", path, cls.from_json)

    def failed(self, max_ppl_increase: float | None = None, max_lambada_drop: float | None = None) -> list[str]:
        """Return one line for each metric that is worse than its limit; [] if none is.

        max_ppl_increase: 0.02 is 2 %. max_lambada_drop: percentage points of accuracy. A value equal to its limit
        passes; NaN fails. Raises InputError if the metric was not measured against another model.
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
