"""Record of a comparison: cuts by scorer and size, as JSON, as Markdown, and as CSV with one line per number."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sspruner.evaluation.paired import Interval
from sspruner.files import strict_json
from sspruner.files.fields import flag, integer, items, number, table, text, versioned
from sspruner.files.output import atomic_file
from sspruner.files.provenance import versions
from sspruner.recipes.common import FILE
from sspruner.recipes.compare import CompareRecipe
from sspruner.recipes.yaml import from_data
from sspruner.units import as_bytes, change_text, interval_text, number_text

SAME_STATE = 0.05  # show the smaller dense model next to cuts whose state bytes differ from its own by less than this

NAMED = {"state_bytes", "parameters", "kept", "model"}  # keys of a cut that are not measures
# Tables: title, measure of the cuts, and measure of the dense model in the title.
TABLES = (
    ("change of perplexity", "perplexity_ratio", "perplexity"),
    ("KL to dense, nats per token", "kl_to_dense", ""),
    ("LAMBADA, accuracy", "lambada_accuracy", "lambada_accuracy"),
    ("LAMBADA, nats per last word", "lambada_nll", "lambada_nll"),
    ("associative recall, accuracy", "recall_accuracy", "recall_accuracy"),
    ("associative recall, nats per answer", "recall_nll", "recall_nll"),
)


@dataclass(frozen=True)
class Cut:
    """The sizes of a cut or dense model, and its measures.

    measures: name -> value and ends of the 95 % interval: `perplexity`; against the dense model, on the same tokens,
    `perplexity_ratio`, `kl_to_dense` and `top1_agreement`; `lambada_accuracy`, `lambada_nll`, `recall_accuracy` and
    `recall_nll`, each with its `_change` from the dense model on the same items.
    state_bytes: of recurrent state per sequence. kept: units by dependency group.
    """

    measures: dict[str, Interval]
    state_bytes: int
    parameters: int
    kept: dict[str, int] = field(default_factory=dict)
    model: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return a flat dict: `perplexity` is a number, with `perplexity_interval`; other measures are [value, low,
        high].
        """
        data: dict[str, Any] = {name: interval.to_json() for name, interval in self.measures.items()}
        if "perplexity" in data:
            data |= {"perplexity": data["perplexity"][0], "perplexity_interval": data["perplexity"]}
        data |= {"state_bytes": self.state_bytes, "parameters": self.parameters, "kept": self.kept}
        return data | ({"model": self.model} if self.model else {})

    @classmethod
    def from_json(cls, data: Any) -> Cut:
        """Parse a cut. Raises KeyError, TypeError or ValueError for anything that `to_json` does not write."""
        fields = table(data)
        measures = {name: value for name, value in fields.items() if name not in NAMED}
        if "perplexity_interval" in measures:
            measures["perplexity"] = measures.pop("perplexity_interval")
        return cls(
            measures={name: Interval.from_json(value) for name, value in measures.items()},
            state_bytes=integer(fields["state_bytes"]),
            parameters=integer(fields["parameters"]),
            kept={name: integer(units) for name, units in table(fields["kept"]).items()},
            model=text(fields.get("model", "")),
        )


@dataclass(frozen=True)
class Comparison:
    """The damage of each scorer's cuts. cells: scorer -> sparsity -> the cut, or the reason why it is impossible.

    All scores are one-shot, on the dense model. from_cache: scorers whose scores are from the cache.
    baseline: a smaller dense model, measured on the same tokens.
    """

    axis: str
    sparsities: tuple[float, ...]
    dense: Cut
    cells: dict[str, dict[float, Cut | str]]
    from_cache: tuple[str, ...]
    calibration: dict[str, Any]
    seed: int
    baseline: Cut | None = None
    model: str = ""
    command: str = ""
    versions: dict[str, str] = field(default_factory=versions)
    recipe: CompareRecipe | None = None

    def named(self, model: str, command: str, baseline: str | None = None) -> Comparison:
        """Return the same comparison with the names of the models and the command that ran."""
        small = replace(self.baseline, model=baseline or "") if self.baseline else None
        return replace(self, model=model, command=command, baseline=small)

    def to_json(self) -> str:
        """Return the content of compare.json; a cell is a cut, or has `error`."""
        data = {
            "version": 1,
            "model": self.model,
            "axis": self.axis,
            "sparsities": self.sparsities,
            "dense": self.dense.to_json(),
            "cells": {label: row_to_json(row) for label, row in self.cells.items()},
            "baseline": self.baseline.to_json() if self.baseline else None,
            "from_cache": self.from_cache,
            "calibration": self.calibration,
            "seed": self.seed,
            "versions": self.versions,
            "command": self.command,
            **({"recipe": self.recipe.to_json()} if self.recipe else {}),
        }
        return strict_json.dumps(data, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, data: Any) -> Comparison:
        """Parse a comparison, from its text or from the parsed JSON; unknown keys are ignored.

        Raises KeyError, TypeError or ValueError for anything that `to_json` does not write.
        """
        fields = versioned(strict_json.loads(data) if isinstance(data, str) else data)
        calibration = table(fields["calibration"])
        checked = {"source": text, "tokens": integer, "held_out_tokens": integer, "held_out_is_separate": flag}
        return cls(
            axis=text(fields["axis"]),
            sparsities=tuple(map(number, items(fields["sparsities"]))),
            dense=Cut.from_json(fields["dense"]),
            cells={label: row_from_json(row) for label, row in table(fields["cells"]).items()},
            from_cache=tuple(map(text, items(fields["from_cache"]))),
            calibration=calibration | {name: check(calibration[name]) for name, check in checked.items()},
            seed=integer(fields["seed"]),
            baseline=Cut.from_json(fields["baseline"]) if fields["baseline"] else None,
            model=text(fields["model"]),
            command=text(fields["command"]),
            versions=table(fields["versions"]),
            recipe=from_data(CompareRecipe, fields["recipe"]) if fields.get("recipe") else None,
        )

    @classmethod
    def load(cls, folder: str | Path) -> Comparison:
        """Read compare.json in a folder. Raises InputError for one that `save` did not write."""
        return strict_json.load("comparison", Path(folder) / "compare.json", cls.from_json)

    def to_markdown(self) -> str:
        """Return the tables that `sspruner compare` prints, as Markdown."""
        parts = []
        for title, head, rows in self.tables():
            lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
            cells = ([cell.replace("|", r"\|") for cell in line] for line in lines)
            parts.append(f"**axis {self.axis}: {title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in cells))
        return "\n\n".join([*parts, "\n".join(f"- {line}" for line in self.notes())]) + "\n"

    def to_csv(self) -> str:
        """Return CSV with one line for each measure of each cut, with its 95 % interval; the dense model has no
        scorer.
        """
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow(["scorer", "sparsity", "state_bytes", "parameters", "measure", "value", "low", "high"])
        rows: list[tuple[str, float | str, Cut | str]] = [("", 0.0, self.dense)]
        rows += [(self.baseline.model, "", self.baseline)] if self.baseline else []
        rows += [(label, sparsity, cut) for label, row in self.cells.items() for sparsity, cut in row.items()]
        for label, sparsity, cut in rows:
            if isinstance(cut, Cut):
                for name, interval in cut.measures.items():
                    lines.writerow([label, sparsity, cut.state_bytes, cut.parameters, name, *interval])
        return text.getvalue()

    def save(self, folder: str | Path) -> None:
        """Write compare.json, compare.md, compare.csv and the recipe that made them, each atomically."""
        if self.recipe:
            self.recipe.save(Path(folder) / FILE)
        for suffix, content in (("json", self.to_json()), ("md", self.to_markdown()), ("csv", self.to_csv())):
            with atomic_file(Path(folder) / f"compare.{suffix}") as temporary:
                temporary.write_text(content, encoding="utf-8", errors="backslashreplace")

    def tables(self) -> Iterator[tuple[str, list[str], list[list[str]]]]:
        """Yield (title, header, rows) for every measure taken: a row for each scorer, a column for each cut."""
        head = ["scorer", *(f"{100 * sparsity:g} %" for sparsity in self.sparsities)]
        for title, measure, of_dense in TABLES:
            if measure not in self.dense.measures:
                continue
            rows = [[label, *(_shown(row[s], measure) for s in self.sparsities)] for label, row in self.cells.items()]
            if self.baseline:
                baseline = _shown(self.baseline, measure)
                beside_cuts = (baseline if self._has_state_of_baseline(s) else "" for s in self.sparsities)
                rows.append([f"smaller dense: {self.baseline.model}", *beside_cuts])
            dense = f"; dense {_shown(self.dense, of_dense)}" if of_dense else ""
            yield f"{title}, 95 % intervals{dense}", head, rows

    def _has_state_of_baseline(self, sparsity: float) -> bool:
        target = self.baseline.state_bytes if self.baseline else 0
        cuts = [row[sparsity] for row in self.cells.values()]
        return any(isinstance(cut, Cut) and abs(cut.state_bytes - target) < SAME_STATE * target for cut in cuts)

    def notes(self) -> list[str]:
        """Return the reasons of impossible cuts, and how everything was measured."""
        cells = [(label, cut) for label, row in self.cells.items() for cut in row.values()]
        reasons = [f"– {label}: {cut}" for label, cut in cells if isinstance(cut, str)]
        data = self.calibration
        where = (
            "held out"
            if data["held_out_is_separate"]
            else "NOT held out: a single sequence, or a text that repeats itself"
        )
        lines = [
            f"one-shot scores; calibration: {data['source']}, {data['tokens']:,} tokens; measured on "
            f"{data['held_out_tokens']:,} others ({where}); seed {self.seed}"
        ]
        if (small := self.baseline) and "perplexity" in small.measures:
            ratio = small.measures["perplexity_ratio"]
            lines.append(
                f"smaller dense model {small.model}: {as_bytes(small.state_bytes)} of state per sequence, "
                f"{small.parameters:,} parameters; perplexity {number_text(small.measures['perplexity'].value)}, "
                f"{interval_text(ratio)} times the dense model's"
            )
        if self.from_cache:
            lines.append(f"from the cache: {', '.join(self.from_cache)}; --no-cache scores again")
        return [*dict.fromkeys(reasons), *lines]


def row_to_json(row: dict[float, Cut | str]) -> dict[str, Any]:
    """Return one scorer's cuts, by sparsity: with all its digits, for it is looked up when it is read again."""
    return {repr(float(s)): {"error": cut} if isinstance(cut, str) else cut.to_json() for s, cut in row.items()}


def row_from_json(data: Any) -> dict[float, Cut | str]:
    """Parse one scorer's cuts."""
    return {
        float(sparsity): text(cut["error"]) if "error" in table(cut) else Cut.from_json(cut)
        for sparsity, cut in table(data).items()
    }


def _shown(cut: Cut | str, measure: str) -> str:
    """Format a measure of a cut: a ratio as the change in per cent, a share in per cent."""
    if isinstance(cut, str):
        return "–"
    found = cut.measures[measure]
    if measure.endswith("_ratio"):
        return change_text(found)
    if measure.endswith("_accuracy"):
        return interval_text([100 * x for x in found], unit=" %")
    return interval_text(found)
