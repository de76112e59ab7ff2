"""Record of a leaderboard: recipes x models x cuts, each over several seeds, as JSON and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from sspruner.evaluation.paired import Interval
from sspruner.files import strict_json
from sspruner.files.fields import integer, items, number, table, text, versioned
from sspruner.units import as_bytes, change_text, interval_text, number_text

FILE = "leaderboard.json"
RATIO, KL, RECALL = "perplexity_ratio", "kl_to_dense", "recall_accuracy"
HEAD = ("recipe", "removed", "change of perplexity", "KL to dense", "recall", "state of a sequence", "seconds",
        "forwards", "memory", "loads in")  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What all rows share. calibration: keys of a recipe's part. measured: source of the text; windows: at most."""

    models: tuple[str, ...]
    seeds: tuple[int, ...]
    sparsities: tuple[float, ...]
    calibration: dict[str, Any]
    measured: str
    windows: int

    @classmethod
    def from_json(cls, data: Any) -> Settings:
        """Parse the settings. Raises KeyError or TypeError for anything else."""
        fields = table(data)
        return cls(
            models=tuple(map(text, items(fields["models"]))),
            seeds=tuple(map(integer, items(fields["seeds"]))),
            sparsities=tuple(map(number, items(fields["sparsities"]))),
            calibration=table(fields["calibration"]),
            measured=text(fields["measured"]),
            windows=integer(fields["windows"]),
        )


@dataclass(frozen=True)
class Entry:
    """One recipe at one cut of one model, over its seeds.

    measures    `perplexity_ratio` and `kl_to_dense`, recall_accuracy of a model that was trained on recall: value and
                95 % interval over windows or tasks, of each of which the mean over seeds counts
    state_bytes recurrent state of a sequence after the cut; of the seeds the most, as of parameters and memory
    seconds     of a prune without its calibration text and its measurement: mean over seeds
    forwards    the same, in forward passes of the dense model over the calibration text
    memory      bytes by which the process grew at its peak; None where the system does not say
    loads       runtime -> "", or why it does not load the cut model
    key         hash of what the numbers depend on, without the engine's code; made_with: version of sspruner
    """

    measures: dict[str, Interval]
    state_bytes: int
    parameters: int
    seconds: float
    forwards: float
    memory: int | None
    loads: dict[str, str]
    seeds: tuple[int, ...]
    key: str
    made_with: str

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return vars(self) | {"measures": {name: value.to_json() for name, value in self.measures.items()}}

    @classmethod
    def from_json(cls, data: Any) -> Entry:
        """Parse an entry. Raises KeyError, TypeError or ValueError for anything else."""
        fields = table(data)
        return cls(
            measures={name: Interval.from_json(value) for name, value in table(fields["measures"]).items()},
            state_bytes=integer(fields["state_bytes"]),
            parameters=integer(fields["parameters"]),
            seconds=number(fields["seconds"]),
            forwards=number(fields["forwards"]),
            memory=None if fields["memory"] is None else integer(fields["memory"]),
            loads={name: text(why) for name, why in table(fields["loads"]).items()},
            seeds=tuple(map(integer, items(fields["seeds"]))),
            key=text(fields["key"]),
            made_with=text(fields["made_with"]),
        )


@dataclass(frozen=True)
class Refusal:
    """Why a recipe cannot make a cut of a model."""

    error: str
    key: str

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return vars(self)


@dataclass(frozen=True)
class Dense:
    """A model before any cut. text: SHA-256 of the token ids that were measured."""

    fingerprint: str
    measures: dict[str, Interval]
    state_bytes: int
    parameters: int
    text: str

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return vars(self) | {"measures": {name: value.to_json() for name, value in self.measures.items()}}

    @classmethod
    def from_json(cls, data: Any) -> Dense:
        """Parse it. Raises KeyError, TypeError or ValueError for anything else."""
        fields = table(data)
        return cls(
            fingerprint=text(fields["fingerprint"]),
            measures={name: Interval.from_json(value) for name, value in table(fields["measures"]).items()},
            state_bytes=integer(fields["state_bytes"]),
            parameters=integer(fields["parameters"]),
            text=text(fields["text"]),
        )


@dataclass(frozen=True)
class Row:
    """A recipe, and model -> sparsity -> entry. recipe: `Recipe.to_json`, without a sparsity and a seed."""

    recipe: dict[str, Any]
    entries: dict[str, dict[float, Entry | Refusal]] = field(default_factory=dict)

    def of(self, model: str, sparsity: float) -> Entry | Refusal | None:
        """Return the entry of a cut, None if it is not made yet."""
        return self.entries.get(model, {}).get(sparsity)

    def with_entry(self, model: str, sparsity: float, entry: Entry | Refusal) -> Row:
        """Return the row with one more entry."""
        return replace(self, entries={**self.entries, model: {**self.entries.get(model, {}), sparsity: entry}})

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        cuts = {m: {repr(s): found[s].to_json() for s in sorted(found)} for m, found in sorted(self.entries.items())}
        return {"recipe": self.recipe, "entries": cuts}

    @classmethod
    def from_json(cls, data: Any) -> Row:
        """Parse a row. Raises KeyError, TypeError or ValueError for anything else."""
        fields = table(data)
        cuts = {m: {float(s): _entry(e) for s, e in table(c).items()} for m, c in table(fields["entries"]).items()}
        return cls(table(fields["recipe"]), cuts)


def _entry(data: Any) -> Entry | Refusal:
    return Refusal(text(data["error"]), text(data["key"])) if "error" in table(data) else Entry.from_json(data)


@dataclass(frozen=True)
class Leaderboard:
    """Rows by label, and dense models by name. Rows with less damage stand first, whatever the order they came in."""

    settings: Settings
    dense: dict[str, Dense] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)

    @property
    def ranked(self) -> list[str]:
        """Return the labels by mean logarithm of the perplexity ratio, those that lack a cut last."""
        return sorted(self.rows, key=lambda label: (*self._rank(self.rows[label]), label))

    def _rank(self, row: Row) -> tuple[int, float]:
        cuts = [row.of(model, sparsity) for model in self.settings.models for sparsity in self.settings.sparsities]
        ratios = [cut.measures[RATIO].value for cut in cuts if isinstance(cut, Entry)]
        worst = [math.log(ratio) if 0 < ratio < math.inf else math.inf for ratio in ratios]
        return len(cuts) - len(ratios), sum(worst) / max(1, len(ratios))

    def to_json(self) -> str:
        """Return the content of leaderboard.json."""
        data = {
            "version": 1,
            "settings": vars(self.settings),
            "dense": {name: dense.to_json() for name, dense in sorted(self.dense.items())},
            "rows": {label: self.rows[label].to_json() for label in self.ranked},
        }
        return strict_json.dumps(data, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, data: Any) -> Leaderboard:
        """Parse a leaderboard, from its text or from the parsed JSON; unknown keys are ignored.

        Raises KeyError, TypeError or ValueError for anything that `to_json` does not write.
        """
        fields = versioned(strict_json.loads(data) if isinstance(data, str) else data)
        return cls(
            Settings.from_json(fields["settings"]),
            {name: Dense.from_json(dense) for name, dense in table(fields["dense"]).items()},
            {label: Row.from_json(row) for label, row in table(fields["rows"]).items()},
        )

    @classmethod
    def load(cls, folder: str | Path) -> Leaderboard:
        """Read leaderboard.json in a folder. Raises InputError for one that `leaderboard` did not write."""
        return strict_json.load("leaderboard", Path(folder) / FILE, cls.from_json)

    def tables(self) -> Iterator[tuple[str, tuple[str, ...], list[list[str]]]]:
        """Yield (title, header, rows) for every model: a line for each recipe and cut, less damage first."""
        for model in self.settings.models:
            if dense := self.dense.get(model):
                cuts = product(self.settings.sparsities, self.ranked)
                found = [(label, s, cut) for s, label in cuts if (cut := self.rows[label].of(model, s))]
                said = f"dense: perplexity {interval_text(dense.measures['perplexity'])}"
                if RECALL in dense.measures:
                    said += f", recall {_share(dense.measures[RECALL])}"
                said += f", {as_bytes(dense.state_bytes)} of state"
                yield f"{model}; {said}", HEAD, [self._line(*one, dense) for one in found]

    def _line(self, label: str, sparsity: float, cut: Entry | Refusal, dense: Dense) -> list[str]:
        """Return a line of a table; what is not known is –. A cut that lacks seeds of the others says which it has."""
        if isinstance(cut, Refusal):
            return [label, f"{100 * sparsity:g} %", *["–"] * (len(HEAD) - 2)]
        few = "" if cut.seeds == self.settings.seeds else f" (seeds {', '.join(map(str, cut.seeds))} alone)"
        recall = cut.measures.get(RECALL)
        kept = f"{as_bytes(cut.state_bytes)} ({100 * cut.state_bytes / max(1, dense.state_bytes):.0f} %)"
        return [
            f"{label}{few}",
            f"{100 * sparsity:g} %",
            change_text(cut.measures[RATIO]),
            interval_text(cut.measures[KL]),
            _share(recall) if recall else "–",
            kept,
            number_text(cut.seconds),
            number_text(cut.forwards),
            "–" if cut.memory is None else as_bytes(cut.memory),
            ", ".join(["sspruner", *(name for name, why in cut.loads.items() if not why)]),
        ]

    def to_markdown(self) -> str:
        """Return the tables and what they say, as Markdown."""
        parts = []
        for title, head, rows in self.tables():
            lines = [head, ["---", *["---:"] * (len(head) - 2), "---"], *rows]
            cells = ([cell.replace("|", r"\|") for cell in line] for line in lines)
            parts.append(f"**{title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in cells))
        return "\n\n".join([*parts, "\n".join(f"- {line}" for line in self.notes())]) + "\n"

    def notes(self) -> list[str]:
        """Return how everything was measured, why cuts are impossible, and why runtimes do not load them."""
        s = self.settings
        text_of = s.calibration
        shared = (
            f"calibrated on {text_of['source']}, {text_of['samples']} windows of {text_of['seq_len']} tokens; measured "
            f"on {s.measured}, at most {s.windows} windows, none of which was calibrated on; seeds "
            f"{', '.join(map(str, s.seeds))}; 95 % intervals over windows"
        )
        every = [(label, m, c) for label in self.ranked for m, cuts in self.rows[label].entries.items()
                 for c in cuts.values()]  # fmt: skip
        refused = [f"– {label}, {model}: {cut.error}" for label, model, cut in every if isinstance(cut, Refusal)]
        return [shared, *dict.fromkeys(refused), *self._unloadable()]

    def _unloadable(self) -> list[str]:
        """Return why runtimes do not load cuts: a line for each reason, with the cuts that it holds for."""
        where: dict[tuple[str, str], dict[str, None]] = {}  # runtime and reason -> cuts, in order
        for model, sparsity, label in product(self.settings.models, self.settings.sparsities, self.ranked):
            cut = self.rows[label].of(model, sparsity)
            for named in cut.loads.items() if isinstance(cut, Entry) else ():
                where.setdefault(named, {})[f"{model} {100 * sparsity:g} %"] = None
        return [f"{runtime}, {', '.join(cuts)}: {why}" for (runtime, why), cuts in where.items() if why]


def _share(found: Interval) -> str:
    return interval_text([100 * x for x in found], unit=" %")
