"""Record of a bench: a timing for each model, batch and phase, as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from sspruner.benchmarking.ceiling import Rates, Work
from sspruner.benchmarking.statistics import median_interval
from sspruner.errors import InputError
from sspruner.evaluation.paired import Interval
from sspruner.files import strict_json
from sspruner.files.fields import integer, items, number, table, text, versioned
from sspruner.files.output import write_file
from sspruner.files.provenance import versions

DECODE, PREFILL = "decode", "prefill"
TRANSFORMERS = {"name": "transformers", "version": "", "notes": []}


@dataclass(frozen=True)
class Timing:
    """One model at one batch in one phase.

    seconds     of each repeat: of one step (decode), or of the whole prompt (prefill), for all sequences
    tokens      processed in these seconds, over all sequences; files of version 0.1.0 have neither: () and 0
    tokens_per_second, ms    medians, and their intervals
    ceiling     maximum tokens per second
    work        minimal bytes and operations
    peak_bytes  of this model only: weights, caches, activations; on the CPU the growth of the process, None if the
                system does not report it
    state_bytes recurrent state per sequence
    cache_bytes of all caches of one sequence, as the engine counts them; None in transformers
    path        the code path that ran
    """

    model: str
    batch: int
    phase: str
    seconds: tuple[float, ...]
    tokens: int
    tokens_per_second: Interval
    ms: Interval
    ceiling: float
    work: Work
    peak_bytes: int | None
    state_bytes: int
    weight_bytes: int
    path: str
    cache_bytes: int | None = None

    @property
    def fraction(self) -> float:
        """Return the fraction of the ceiling that was reached."""
        return self.tokens_per_second.value / self.ceiling

    def speedup(self, over: Timing) -> Interval:
        """Return how many times as fast as another timing this is, from the medians of both; its interval is by repeat.

        Raises InputError if the seconds of the repeats are not recorded.
        """
        if not self.seconds or not over.seconds:
            raise InputError("bench: this file has no seconds of single repeats; measure again")
        value = median(over.seconds) / median(self.seconds)
        _, low, high = median_interval([b / a for a, b in zip(self.seconds, over.seconds, strict=True)])
        return Interval(value, min(low, value), max(high, value))

    def to_json(self) -> dict[str, Any]:
        """Return all numbers, for programs."""
        return {
            "model": self.model,
            "batch": self.batch,
            "phase": self.phase,
            "tokens_per_second": self.tokens_per_second.to_json(),
            "ms": self.ms.to_json(),
            "ceiling_tokens_per_second": self.ceiling,
            "fraction": self.fraction,
            "peak_bytes": self.peak_bytes,
            "state_bytes": self.state_bytes,
            "weight_bytes": self.weight_bytes,
            "bytes_moved": self.work.bytes,
            "operations": self.work.operations,
            "path": self.path,
            **({} if self.cache_bytes is None else {"cache_bytes": self.cache_bytes}),
            **({"tokens": self.tokens, "seconds": [*self.seconds]} if self.seconds else {}),
        }

    @classmethod
    def from_json(cls, data: Any) -> Timing:
        """Parse a timing. Raises KeyError, TypeError or ValueError for anything that `to_json` does not write."""
        fields = table(data)
        return cls(
            model=text(fields["model"]),
            batch=integer(fields["batch"]),
            phase=text(fields["phase"]),
            seconds=tuple(map(number, items(fields.get("seconds", [])))),
            tokens=integer(fields.get("tokens", 0)),
            tokens_per_second=Interval.from_json(fields["tokens_per_second"]),
            ms=Interval.from_json(fields["ms"]),
            ceiling=number(fields["ceiling_tokens_per_second"]),
            work=Work(integer(fields["bytes_moved"]), integer(fields["operations"])),
            peak_bytes=None if fields["peak_bytes"] is None else integer(fields["peak_bytes"]),
            state_bytes=integer(fields["state_bytes"]),
            weight_bytes=integer(fields["weight_bytes"]),
            path=text(fields["path"]),
            cache_bytes=integer(fields["cache_bytes"]) if "cache_bytes" in fields else None,
        )


def timing(seconds: Sequence[float], tokens: int, work: Work, rates: Rates, **what: Any) -> Timing:
    """Make a timing from the seconds of its repeats. what: the other fields of `Timing`."""
    return Timing(
        seconds=tuple(seconds),
        tokens=tokens,
        tokens_per_second=median_interval([tokens / s for s in seconds]),
        ms=Interval(*(1000 * s for s in median_interval(seconds))),
        ceiling=tokens / work.seconds(rates),
        work=work,
        **what,
    )


@dataclass(frozen=True)
class Bench:
    """All timings of one run.

    failed: model, batch and reason of those that did not fit into memory.
    engine: its name, its version, and notes on it; empty in files of versions that knew none but transformers.
    """

    rows: tuple[Timing, ...]
    machine: dict[str, Any]
    prompt: int
    generate: int
    repeats: int
    seed: int
    failed: tuple[dict[str, Any], ...] = ()
    profile: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    versions: dict[str, str] = field(default_factory=versions)
    engine: dict[str, Any] = field(default_factory=lambda: {**TRANSFORMERS, "version": versions()["transformers"]})

    def row(self, model: str, batch: int, phase: str = DECODE) -> Timing:
        """Return the row of a model. Raises KeyError if there is none: it did not fit, or was not requested."""
        for row in self.rows:
            if (row.model, row.batch, row.phase) == (model, batch, phase):
                return row
        raise KeyError((model, batch, phase))

    def to_json(self) -> str:
        """Return the content of bench.json."""
        data = {
            "version": 1,
            "machine": self.machine,
            "versions": self.versions,
            **({"engine": self.engine} if self.engine else {}),
            "command": self.command,
            "seed": self.seed,
            "prompt": self.prompt,
            "generate": self.generate,
            "repeats": self.repeats,
            "rows": [row.to_json() for row in self.rows],
            "failed": list(self.failed),
            "profile": self.profile,
        }
        return strict_json.dumps(data, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, data: Any) -> Bench:
        """Parse a bench, from its text or from the parsed JSON; unknown keys are ignored.

        Raises KeyError, TypeError or ValueError for anything that `to_json` does not write.
        """
        fields = versioned(strict_json.loads(data) if isinstance(data, str) else data)
        return cls(
            rows=tuple(map(Timing.from_json, items(fields["rows"]))),
            machine=table(fields["machine"]),
            prompt=integer(fields["prompt"]),
            generate=integer(fields["generate"]),
            repeats=integer(fields["repeats"]),
            seed=integer(fields["seed"]),
            failed=tuple(map(table, items(fields["failed"]))),
            profile={label: items(rows) for label, rows in table(fields["profile"]).items()},
            command=text(fields["command"]),
            versions=table(fields["versions"]),
            engine=table(fields.get("engine", {})),
        )

    def save(self, path: str | Path) -> None:
        """Write bench.json atomically."""
        write_file(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Bench:
        """Read a bench. Raises InputError for a file that `save` did not write."""
        return strict_json.load("bench", path, cls.from_json)
