"""What lies in a folder that `sspruner report` shows: comparisons, benches, evaluations, prunes and scores, checked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sspruner.errors import InputError
from sspruner.scoring.scores import Scores

Interval = tuple[float, float, float]  # a value, and its 95 % interval; where that is unknown the value again

# What tells the kinds of JSON files apart, in this order: keys that each has.
KINDS = {
    "compare": ("cells", "sparsities"),
    "bench": ("rows", "machine"),
    "evaluation": ("rows", "protocol"),
    "report": ("layers", "dense", "pruned"),
    "plan": ("groups", "made_by"),
}
SIZES = ("state_bytes", "parameters")
SCORES = "scores"  # the name of a file or of a folder with scores


@dataclass(frozen=True)
class Measured:
    """A model that was measured: metric -> interval, and its sizes where they are known."""

    metrics: dict[str, Interval]
    state_bytes: int | None
    parameters: int | None


@dataclass(frozen=True)
class Compared:
    """compare.json. cells: scorer -> fraction removed -> what that costs, or why it cannot be done."""

    model: str
    axis: str
    sparsities: tuple[float, ...]
    dense: Measured
    cells: dict[str, dict[float, Measured | str]]
    baseline: Measured | None


@dataclass(frozen=True)
class Timed:
    """A row of bench.json: one model, batch and phase."""

    model: str
    batch: int
    phase: str
    tokens: Interval  # per second
    ms: Interval
    ceiling: float | None  # tokens per second
    state_bytes: int | None
    peak_bytes: int | None
    path: str


@dataclass(frozen=True)
class Evaluated:
    """evaluation.json. rows: metric, value, that of the other model, the change and its kind, and how many items."""

    model: str
    against: str
    rows: tuple[tuple[str, Interval, Interval | None, Interval | None, str, int | None], ...]
    more: dict[str, dict[str, dict[str, Interval]]]  # title -> row -> column -> value


@dataclass(frozen=True)
class Cut:
    """report.json or plan.json. layers: dependency group -> units before and after; costs: what -> before, after."""

    model: str
    layers: dict[str, tuple[int, int]]
    costs: dict[str, tuple[float | None, float]]


@dataclass
class Folder:
    """Everything that was found, by the path in the folder; origin: path -> what it says of how it was made."""

    compared: dict[str, Compared] = field(default_factory=dict)
    timed: dict[str, tuple[Timed, ...]] = field(default_factory=dict)
    evaluated: dict[str, Evaluated] = field(default_factory=dict)
    cuts: dict[str, Cut] = field(default_factory=dict)
    scores: dict[str, Scores] = field(default_factory=dict)  # by name
    origin: dict[str, dict[str, str]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any((self.compared, self.timed, self.evaluated, self.cuts, self.scores))


def read_folder(folder: str | Path) -> Folder:
    """Read a folder and its subfolders, one level deep. Other files are passed over.

    Raises InputError for a folder that is missing or holds nothing of ours, and for a damaged file.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise InputError(f"report {folder}: no such folder")
    found = Folder()
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".json":
            _add_json(found, path, name)
        elif _is_scores(path):
            _add_scores(found, path, name)
    if not found:
        raise InputError(
            f"report {folder}: holds nothing to show; give a folder that `sspruner compare --out` or "
            "`sspruner prune --out` wrote, or one with results of bench or evaluate"
        )
    plans = [name for name in found.cuts if name.endswith("plan.json")]
    for name in plans:  # a report says the same, and what it cost
        if name.removesuffix("plan.json") + "report.json" in found.cuts:
            del found.cuts[name], found.origin[name]
    return found


def _files(folder: Path) -> Iterator[Path]:
    """JSON and safetensors files, those of the folder itself first."""
    folders = [folder, *sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))]
    for place in folders:
        for path in sorted(place.iterdir()):
            if path.suffix in (".json", ".safetensors") and path.is_file():
                yield path


def _add_json(found: Folder, path: Path, name: str) -> None:
    try:
        data = clean(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"report {path}: cannot be read as JSON ({_brief(error)}); make it again") from error
    kind = _kind(path, data)
    if not kind:
        return
    try:
        if data["version"] != 1:
            raise ValueError("its version is not 1")
        READERS[kind](found, name, data)
        found.origin[name] = _origin(data)
    except (KeyError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise InputError(f"report {path}: not a whole {kind}.json ({_brief(error)}); make it again") from error


def _kind(path: Path, data: Any) -> str:
    if path.stem in KINDS:
        return path.stem
    return next((k for k, keys in KINDS.items() if isinstance(data, dict) and all(key in data for key in keys)), "")


def _is_scores(path: Path) -> bool:
    """Whether a safetensors file holds scores: by its name, or because its metadata names a scorer."""
    if path.stem == SCORES or path.parent.name == SCORES:
        return True
    try:
        with safe_open(str(path), framework="pt") as f:
            return "scorer" in (f.metadata() or {})
    except (SafetensorError, OSError):
        return False  # somebody's weights


def _add_scores(found: Folder, path: Path, name: str) -> None:
    scores = Scores.load(path)
    label = clean(scores.metadata.get("scorer", path.stem) if path.stem == SCORES else path.stem)
    label = label if label not in found.scores else name.removesuffix(path.suffix)
    found.scores[label] = Scores(scores.importance, clean(scores.metadata), bases=scores.bases)
    found.origin[name] = {key: found.scores[label].metadata.get(key, "") for key in ("scorer", "calibration", "seed")}


def _compare(found: Folder, name: str, data: dict[str, Any]) -> None:
    dense = dict(data["dense"]) if "dense" in data else {"perplexity": data["dense_perplexity"]}
    base = _measured(dense, None)
    cells = {
        label: {float(s): str(cell["error"]) if "error" in cell else _measured(cell, base) for s, cell in row.items()}
        for label, row in data["cells"].items()
    }
    other = data.get("baseline")
    found.compared[name] = Compared(
        model=str(data.get("model", "")),
        axis=str(data["axis"]),
        sparsities=tuple(float(s) for s in data["sparsities"]),
        dense=base,
        cells=cells,
        baseline=_measured(other, base) if other else None,
    )


def _measured(data: dict[str, Any], dense: Measured | None) -> Measured:
    metrics = {
        name: interval(value)
        for name, value in data.items()
        if name not in (*SIZES, "kept") and value is not None and not isinstance(value, str | dict)
    }
    if dense and "perplexity_ratio" not in metrics and "perplexity" in metrics and "perplexity" in dense.metrics:
        ratio = metrics["perplexity"][0] / dense.metrics["perplexity"][0]
        metrics["perplexity_ratio"] = (ratio, ratio, ratio)
    return Measured(metrics, *(None if data.get(key) is None else int(data[key]) for key in SIZES))


def _bench(found: Folder, name: str, data: dict[str, Any]) -> None:
    found.timed[name] = tuple(
        Timed(
            model=str(row["model"]),
            batch=int(row["batch"]),
            phase=str(row["phase"]),
            tokens=interval(row["tokens_per_second"]),
            ms=interval(row["ms"]),
            ceiling=_maybe(row.get("ceiling_tokens_per_second")),
            state_bytes=None if row.get("state_bytes") is None else int(row["state_bytes"]),
            peak_bytes=None if row.get("peak_bytes") is None else int(row["peak_bytes"]),
            path=str(row.get("path", "")),
        )
        for row in data["rows"]
    )


def _evaluation(found: Folder, name: str, data: dict[str, Any]) -> None:
    rows = []
    for row in data["rows"]:
        kind = "ratio" if row.get("ratio") is not None else "difference"
        change = row.get(kind)
        against, items = row.get("against"), row.get("items")
        rows.append(
            (
                str(row["metric"]),
                interval(row["value"]),
                None if against is None else interval(against),
                None if change is None else interval(change),
                kind,
                None if items is None else int(items),
            )
        )
    titles = [key for key in ("perplexity_by_position", "perplexity_by_length") if isinstance(data.get(key), dict)]
    more = {title: {str(row): _columns(value) for row, value in data[title].items()} for title in titles}
    found.evaluated[name] = Evaluated(str(data.get("model", "")), str(data.get("against") or ""), tuple(rows), more)


def _columns(value: Any) -> dict[str, Interval]:
    """The numbers of a row; its name is said elsewhere."""
    values = value if isinstance(value, dict) else {"value": value}
    return {str(column): interval(v) for column, v in values.items() if v is not None and not isinstance(v, str)}


def _report(found: Folder, name: str, data: dict[str, Any]) -> None:
    dense, pruned = data["dense"], data["pruned"]
    costs = {
        key: (_maybe(dense.get(key)), number(pruned[key]))
        for key in ("perplexity", "kl_to_dense", "parameters", "weight_bytes", "state_bytes")
        if key in pruned
    }
    found.cuts[name] = Cut(str(data.get("model", "")), _layers(data["layers"]), costs)


def _plan(found: Folder, name: str, data: dict[str, Any]) -> None:
    found.cuts[name] = Cut("", _layers(data["groups"]), {})


def _layers(data: dict[str, Any]) -> dict[str, tuple[int, int]]:
    return {group: (int(size["before"]), int(size["after"])) for group, size in data.items()}


READERS = {"compare": _compare, "bench": _bench, "evaluation": _evaluation, "report": _report, "plan": _plan}


def _origin(data: dict[str, Any]) -> dict[str, str]:
    """How a file says that it was made."""
    made = data.get("made_by", {}) | data  # of a plan
    calibration = made.get("calibration", "")
    source = calibration.get("source", "") if isinstance(calibration, dict) else calibration
    told = {
        "command": made.get("command", ""),
        "seed": made.get("seed", ""),
        "calibration": source,
        "machine": _listed(data.get("machine", {})),
        "versions": _listed(data.get("versions", {})),
    }
    return {key: str(value) for key, value in told.items() if value != ""}


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def interval(value: Any) -> Interval:
    """A number, or [value, low, high]. Raises TypeError or ValueError for anything else."""
    if isinstance(value, list):
        middle, low, high = (number(part) for part in value)
        return middle, low, high
    return (number(value),) * 3


def number(value: Any) -> float:
    """A number that is one: not a string, not true. It may be infinite, or null, which stands for what is no number."""
    if value is None:
        return nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{str(value)[:40]!r} is not a number")
    return float(value)


def _maybe(value: Any) -> float | None:
    return None if value is None else number(value)


def clean(data: Any) -> Any:
    """Data with its strings free of control characters and of what is no text, which neither HTML nor SVG can hold."""
    if isinstance(data, str):
        return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in data)
    if isinstance(data, dict):
        return {clean(key): clean(value) for key, value in data.items()}
    return [clean(value) for value in data] if isinstance(data, list) else data


def _brief(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]
