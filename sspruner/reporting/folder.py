"""Read a folder for `sspruner report`: comparisons, benches, evaluations, prunes and scores, validated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sspruner.benchmarking.record import Bench
from sspruner.comparison.board import Leaderboard
from sspruner.comparison.record import Comparison
from sspruner.errors import InputError
from sspruner.evaluation.result import Evaluation
from sspruner.files import strict_json
from sspruner.plans.plan import PlanSummary
from sspruner.pruning.report import Report
from sspruner.scoring.scores import Scores

# Keys that identify each kind of JSON file, tried in this order.
KINDS = {
    "compare": ("cells", "sparsities"),
    "bench": ("rows", "machine"),
    "evaluation": ("rows", "protocol"),
    "report": ("layers", "dense", "pruned"),
    "plan": ("groups", "made_by"),
    "leaderboard": ("settings", "rows"),
}
READERS: dict[str, Callable[[Any], Any]] = {
    "compare": Comparison.from_json,
    "bench": Bench.from_json,
    "evaluation": Evaluation.from_json,
    "report": Report.from_json,
    "plan": PlanSummary.from_json,
    "leaderboard": Leaderboard.from_json,
}
SCORES = "scores"  # name of a file or folder with scores


@dataclass
class Folder:
    """All results in a folder, by path; origin: path -> command, seed, calibration, machine, versions."""

    compare: dict[str, Comparison] = field(default_factory=dict)
    bench: dict[str, Bench] = field(default_factory=dict)
    evaluation: dict[str, Evaluation] = field(default_factory=dict)
    report: dict[str, Report] = field(default_factory=dict)
    plan: dict[str, PlanSummary] = field(default_factory=dict)
    leaderboard: dict[str, Leaderboard] = field(default_factory=dict)
    scores: dict[str, Scores] = field(default_factory=dict)  # by name
    origin: dict[str, dict[str, str]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        records = (self.compare, self.bench, self.evaluation, self.report, self.plan, self.leaderboard)
        return any((*records, self.scores))


def read_folder(folder: str | Path) -> Folder:
    """Read a folder and its subfolders, one level deep. Other files are ignored.

    Raises InputError for a missing folder, for one without results, and for a damaged file.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise InputError(f"report {folder}: no such folder")
    results = Folder()
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".json":
            _add_json(results, path, name)
        elif _is_scores(path):
            _add_scores(results, path, name)
    if not results:
        raise InputError(
            f"report {folder}: holds nothing to show; give a folder that `sspruner compare --out` or "
            "`sspruner prune --out` wrote, or one with results of bench or evaluate"
        )
    for name in [*results.plan]:  # a report has the same content and more
        if name.removesuffix("plan.json") + "report.json" in results.report:
            del results.plan[name], results.origin[name]
    return results


def _files(folder: Path) -> Iterator[Path]:
    """Yield JSON and safetensors files, those of the folder itself first."""
    folders = [folder, *sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))]
    for place in folders:
        for path in sorted(place.iterdir()):
            if path.suffix in (".json", ".safetensors") and path.is_file():
                yield path


def _add_json(results: Folder, path: Path, name: str) -> None:
    try:
        data = clean(strict_json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"report {path}: cannot be read as JSON ({_brief(error)}); make it again") from error
    kind = _kind(path, data)
    if not kind:
        return
    try:
        record = READERS[kind](data)
    except strict_json.DAMAGE as error:
        raise InputError(f"report {path}: not a whole {kind}.json ({_brief(error)}); make it again") from error
    getattr(results, kind)[name] = record
    results.origin[name] = _origin(record)


def _kind(path: Path, data: Any) -> str:
    if path.stem in KINDS:
        return path.stem
    return next((k for k, keys in KINDS.items() if isinstance(data, dict) and all(key in data for key in keys)), "")


def _is_scores(path: Path) -> bool:
    """Check whether a safetensors file holds scores: by its name, or by a scorer in its metadata."""
    if path.stem == SCORES or path.parent.name == SCORES:
        return True
    try:
        with safe_open(str(path), framework="pt") as f:
            return "scorer" in (f.metadata() or {})
    except (SafetensorError, OSError):
        return False  # weights of a model


def _add_scores(results: Folder, path: Path, name: str) -> None:
    scores = Scores.load(path)
    label = clean(scores.metadata.get("scorer", path.stem) if path.stem == SCORES else path.stem)
    label = label if label not in results.scores else name.removesuffix(path.suffix)
    results.scores[label] = Scores(scores.importance, clean(scores.metadata), bases=scores.bases)
    results.origin[name] = {
        key: results.scores[label].metadata.get(key, "") for key in ("scorer", "calibration", "seed")
    }


def _origin(record: Any) -> dict[str, str]:
    """Return how a record was made: from `made_by` of a plan, from fields of the others."""
    fields = record.made_by if isinstance(record, PlanSummary) else vars(record)
    calibration = fields.get("calibration", "")
    origin = {
        "command": fields.get("command", ""),
        "seed": fields.get("seed", ""),
        "calibration": calibration.get("source", "") if isinstance(calibration, dict) else calibration,
        "machine": _listed(getattr(record, "machine", {})),
        "versions": _listed(getattr(record, "versions", {})),
    }
    return {key: str(value) for key, value in origin.items() if value != ""}


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def clean(data: Any) -> Any:
    """Replace control characters and invalid characters in all strings, since HTML and SVG cannot hold them."""
    if isinstance(data, str):
        return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in data)
    if isinstance(data, dict):
        return {clean(key): clean(value) for key, value in data.items()}
    return [clean(value) for value in data] if isinstance(data, list) else data


def _brief(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]
