"""Run experiments of recipes/: scorers x cuts, each cell a `sspruner.Recipe`, measured on text that no scorer saw.

A file names the table that is drawn (a function of tables.py) and one section or several. Beside fields of a recipe, a
row and a cut may have these: `observed`, `seeds`, `stored` (in few bits), and `train`, which trains the cut model, or
prunes it while it trains (mask_every); a row also `models`, `cuts`, `against`. A cell without a scorer is dense.

Every cell is kept in the work folder under hashes of the model, its recipe, the sizes and the scorer's code. One that
failed is made again. Changes of the engine are not noticed: remove the folder.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from common import Subject, as_is, check_unseen, progress

import sspruner
from sspruner.evaluation.decoded import Decoded
from sspruner.evaluation.windows import alone, losses
from sspruner.graph.fingerprint import fingerprint
from sspruner.recipes.measure import StoredState
from sspruner.recipes.train import Settings
from sspruner.scoring.choice import candidates
from sspruner.scoring.known import find_scorer
from sspruner.training.distil import distil
from sspruner.training.gradual import gradual
from sspruner.training.text import Text

Fields = dict[str, Any]
Version = Callable[[], Any]
OWN = ("models", "cuts", "against")  # keys of a row that do not change its cells
BESIDE = ("observed", "train", "stored", "seeds")  # keys of a cell that are no fields of its recipe
TRAINING: Fields = {"batch": 8, "at_once": 4, "seq_len": 256, "every": 20, "seed": 0}


@dataclass(frozen=True)
class Section:
    """Some rows and cuts on some models.

    rows: "all" tries every scorer of the axis. once: score each row once on the dense model, and plan every cut from
    that. observed, reported, also: arguments of Subject.text; `also` is a second text on which cells are measured.
    show: what the table wants to know. few: the rows and cuts of a quick run. may_fail: the table says why cells are
    missing; else one that cannot be made ends the part.
    """

    models: tuple[str, ...]
    rows: dict[str, Fields] | str
    cuts: dict[str, Fields]
    base: Fields = field(default_factory=dict)
    once: bool = False
    dtype: str = "float32"
    observed: Fields = field(default_factory=dict)
    reported: Fields = field(default_factory=dict)
    also: Fields = field(default_factory=dict)
    passages: int = 0
    show: Fields = field(default_factory=dict)
    few: Fields = field(default_factory=dict)
    may_fail: bool = False
    is_quick: bool = False

    @property
    def axis(self) -> str:
        """Return the axis that is cut."""
        return str(self.base.get("axis", "state"))

    def rows_of(self, model: str) -> dict[str, Fields]:
        """Return the rows of one model."""
        if isinstance(self.rows, str):
            beside: dict[str, Fields] = self.show["beside"]
            return {name: {"scorer": name} for name in candidates(self.axis, "select")} | beside
        return {label: row for label, row in self.rows.items() if model in row.get("models", self.models)}

    def cuts_of(self, row: Fields) -> dict[str, Fields]:
        """Return the cuts of one row."""
        return {label: cut for label, cut in self.cuts.items() if label in row.get("cuts", self.cuts)}

    def cell(self, row: Fields, cut: Fields, seed: int = 0) -> Fields:
        """Return the fields of a cell: those of its recipe, and what is observed and trained."""
        row = {key: value for key, value in row.items() if key not in OWN}
        found = united({"seeds": 1, "mode": "mask", "observed": self.observed}, self.base, row, cut)
        if self.is_quick:
            found |= {"seeds": 1, "observed": found["observed"] | {"windows": self.few.get("windows", 2)}}
        if "pattern" in found:
            found.pop("granularity", None)  # a pattern is one
        train = found.pop("train", {})
        if train.get("tokens"):
            found["train"] = train | ({"tokens": train["tokens"] // 25} if self.is_quick else {})
        if "scorer" not in found and "mask_every" not in train:
            return {key: found[key] for key in ("train", "stored") if key in found}  # the dense model
        observed = found["observed"] | {"seed": found["observed"].get("seed", 0) + seed}
        return found | {"seed": seed, "observed": observed}

    def quick(self) -> Section:
        """Return a little of it: the first model, two rows, one cut, two windows."""
        texts = {key: getattr(self, key) for key in ("observed", "reported", "also")}
        texts = {key: {**text, "windows": self.few.get("windows", 2)} for key, text in texts.items() if text}
        rows, cuts = self.rows, {key: self.cuts[key] for key in self.few.get("cuts", [*self.cuts][1:2] or self.cuts)}
        if not isinstance(rows, str):
            rows = {key: rows[key] for key in self.few.get("rows", [*rows][:2])}
        more: Fields = {"passages": min(self.passages, 4), "models": self.models[:1], "is_quick": True}
        return replace(self, rows=rows, cuts=cuts, **texts, **more)


def united(*parts: Fields) -> Fields:
    """Return the union of several dictionaries, later values before earlier ones, and of dictionaries in them."""
    found: Fields = {}
    for part in parts:
        for key, value in part.items():
            both = isinstance(value, dict) and isinstance(found.get(key), dict)
            found[key] = united(found[key], value) if both else value
    return found


@dataclass(frozen=True)
class Experiment:
    """A file of recipes/."""

    table: str
    sections: tuple[Section, ...]
    note: str

    @classmethod
    def load(cls, file: Path, models: Sequence[str] = ()) -> Experiment:
        """Read an experiment, or its part on some models; what stands beside `sections` holds for all of them."""
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
        data.pop("shared", None)  # only for anchors
        table, note, parts = data.pop("table"), data.pop("note"), data.pop("sections", [{}])
        sections = [Section(**data | part) for part in parts]
        sections = [
            replace(one, models=tuple(n for n in one.models if n in (models or one.models))) for one in sections
        ]
        return cls(table, tuple(one for one in sections if one.models), note)


@dataclass
class Cell:
    """What one cut costs: by window, nats per token, and by passage; or the reason why it cannot be made."""

    record: Fields

    def __contains__(self, key: str) -> bool:
        return key in self.record

    def __getattr__(self, key: str) -> torch.Tensor:
        return torch.tensor(self.record[key], dtype=torch.float64)


@dataclass(frozen=True)
class Found:
    """A section on one model: the dense model's cell, and (row, cut) -> a cell for each seed."""

    model: str
    section: Section
    dense: Cell
    cells: dict[tuple[str, str], list[Cell]]

    @property
    def rows(self) -> list[str]:
        """Return the rows that there are."""
        return list(dict.fromkeys(label for label, _ in self.cells))

    def mean(self, row: str, cut: str, key: str = "nll") -> torch.Tensor | None:
        """Return the mean over seeds, by window or passage; None if no seed has any."""
        good = [getattr(cell, key) for cell in self.cells.get((row, cut), ()) if key in cell]
        return torch.stack(good).mean(0) if good else None


def run(s: Any) -> tuple[Experiment, list[Found]]:
    """Measure what is missing of an experiment, and return its sections by model."""
    experiment = Experiment.load(s.file, getattr(s, "models", ()))
    subjects: dict[tuple[str, str], Subject] = {}
    found = []
    for section in experiment.sections[: 1 if s.quick else None]:
        section = section.quick() if s.quick else section
        for name in section.models:
            key, folder = (name, section.dtype), s.work / name
            if key not in subjects:
                subjects = {key: Subject(folder if folder.is_dir() else name, s.data, section.dtype)}  # one at a time
            found.append(measured(subjects[key], section, s.work / "cells"))
    return experiment, found


def measured(subject: Subject, section: Section, work: Path) -> Found:
    """Measure every cell of a section on one model; those of a row and a seed together."""
    bench = Bench(subject, section, work / f"{subject.name}-{fingerprint(subject.model)[:12]}")
    (dense,) = bench.cells("dense", {"": {}}).values()
    cells: dict[tuple[str, str], list[Cell]] = {}
    for label, row in section.rows_of(subject.name).items():
        cuts = section.cuts_of(row)
        for seed in range(max((seeds(section.cell(row, cut)) for cut in cuts.values()), default=0)):
            asked = {name: section.cell(row, cut, seed) for name, cut in cuts.items()}
            asked = {name: cell for name, cell in asked.items() if seed < seeds(cell)}
            for name, made in bench.cells(label, asked).items():
                cells.setdefault((label, name), []).append(made)
    return Found(subject.name, section, dense, cells)


class Bench:
    """A model, the texts and passages that versions of it are measured on, and the folder of cells."""

    def __init__(self, subject: Subject, section: Section, work: Path) -> None:
        self.subject, self.section, self.work = subject, section, work
        self.reported, self.also = (subject.text(**text) if text else None for text in (section.reported, section.also))
        self.passages = subject.passages(section.passages) if section.passages else []
        self.ends = section.show.get("ends", ())
        chooses = section.also.get("file") == section.observed.get("file")  # on the text of the calibration, as it says
        texts = [text for text in (self.reported, None if chooses else self.also) if text]
        self.windows = [row[kept] for text in texts for row, kept in zip(text.tokens, text.mask, strict=True)]
        self.windows += [torch.tensor(passage.context) for passage in self.passages]
        work.mkdir(parents=True, exist_ok=True)

    def cells(self, label: str, asked: dict[str, Fields]) -> dict[str, Cell]:
        """Return the cells of a row and a seed from their files; make those that are missing, and measure them."""
        section, found, files, versions = self.section, dict[str, Cell](), {}, {}
        for cut, how in asked.items():
            sizes = [section.dtype, section.once, section.reported, section.also, section.passages, self.ends]
            key = json.dumps([how | {"seeds": 1}, sizes, code_of(how.get("scorer"))], sort_keys=True)
            files[cut] = self.work / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
            if files[cut].exists():
                continue
            try:
                run = files[cut].with_suffix(".run")
                versions[cut] = version_of(self.subject, section, how, run, self.windows)
            except Exception as error:  # a broken scorer must not take the others with it
                if not section.may_fail:
                    raise
                said = "" if isinstance(error, sspruner.SSPrunerError) else f"{type(error).__name__}: "
                found[cut] = Cell({"error": f"{said}{error}"})
        made = self.measure([version for version, _ in versions.values()]) if versions else []
        for (cut, (_, kept)), record in zip(versions.items(), made, strict=True):
            progress(f"{self.subject.name} {section.axis} | {label} | {cut}")
            files[cut].write_text(json.dumps(record | {"kept": kept, "cell": asked[cut]}), encoding="utf-8")
            shutil.rmtree(files[cut].with_suffix(".run"), ignore_errors=True)
        return {cut: found.get(cut) or Cell(json.loads(files[cut].read_text(encoding="utf-8"))) for cut in asked}

    def measure(self, versions: list[Version]) -> list[Fields]:
        """Return what is measured of each version, as JSON: see `numbers`. also: nll on the second text."""
        if self.ends:
            return [by_position(version, self.reported, self.ends) for version in versions]
        tasks = self.reported.tokens if self.reported and self.section.reported["file"] == "recall" else None
        text = self.reported if tasks is None else None
        records = [numbers(values) for values in self.subject.measure(versions, text, self.passages, tasks)]
        if self.also:
            others = self.subject.measure(versions, self.also)
            return [r | {"also": numbers(values)["nll"]} for r, values in zip(records, others, strict=True)]
        return records


def version_of(
    subject: Subject, section: Section, cell: Fields, run: Path, windows: list[torch.Tensor]
) -> tuple[Version, list[int]]:
    """Return a version of the model for `measure`, and what its groups keep. run: the folder of a training.

    windows: int64 (T,) each, all that it will be measured on; one that it was calibrated on ends the part.
    """
    how, kept, data = {key: value for key, value in cell.items() if key not in BESIDE}, list[int](), None
    if "scorer" in cell:
        data = subject.text(**cell["observed"])
    if data and section.once:
        plan = planned(subject, how, data)
        check_unseen(plan.made_by, windows, "reported text")
        sizes = {name: group.units for name, group in subject.graph.on_axis(how["axis"]).items()}
        sizes |= {name: reduction.after for name, reduction in plan.groups.items()}
        return subject.masked(plan), sorted(sizes.values())
    model = copy.deepcopy(subject.model)
    if data:
        result = sspruner.prune(model, sspruner.Recipe.of(**how), calibration=data, tokenizer=subject.tokenizer)
        check_unseen(result.plan.made_by, windows, "reported text")
        kept = sorted({selection.after for selection in result.plan.groups.values()})
    if "stored" in cell:
        model = Decoded(model, int(cell["stored"].get("every", 1)), StoredState(**cell["stored"]))
    return as_is(trained(subject, model, cell, run) if "train" in cell else model), kept


def planned(subject: Subject, how: Fields, data: sspruner.Calibration) -> sspruner.Plan:
    """Return the plan of a recipe's fields, from scores of the dense model, with its refit."""
    plan = subject.plan(data, **{key: value for key, value in how.items() if key not in ("mode", "refit")})
    return sspruner.refit(subject.model, plan, how["refit"], calibration=data).plan if "refit" in how else plan


def trained(subject: Subject, model: Any, cell: Fields, run: Path) -> Any:
    """Train a cut model on books, or prune a model while it trains (mask_every). alpha 0: on the text alone."""
    how, teacher = cell["train"], copy.deepcopy(subject.model)
    settings = Settings(max_tokens=how["tokens"], learning_rate=how["rate"], **TRAINING)
    text = Text((str(subject.data / "books-train.txt"),), subject.tokenizer, settings.seq_len, seed=settings.seed)
    model.requires_grad_(True)
    if "mask_every" not in how:
        return distil(model, teacher, text, run, settings=settings, alpha=how["alpha"])[0]
    asked: Fields = {"axis": cell["axis"], "sparsity": cell["sparsity"], "every": how["mask_every"]}
    return gradual(model, text, run, settings=settings, **asked, teacher=teacher if how["alpha"] else None)[0]


def numbers(values: Any) -> Fields:
    """Return nll and kl by window, nats per token; word_nll and word by passage; right by recall task."""
    text, found = values.text, dict[str, Any]()
    if text is not None:
        found = {"nll": (text.nll / text.tokens).tolist(), "kl": (text.kl / text.tokens).tolist()}
    names = {"word_nll": "lambada_nll", "word": "lambada_accuracy", "right": "recall_accuracy"}
    return found | {name: values.items[key].tolist() for name, key in names.items() if key in values.items}


def by_position(version: Version, text: Any, ends: list[int]) -> Fields:
    """Return nll as means over runs of positions that end there, by window: (windows, runs)."""
    with version() as model:
        nll = losses(model, alone(text.tokens, text.mask), 1)  # (windows, T - 1)
    return {"nll": torch.stack([nll[:, max(a - 1, 0) : b - 1].mean(1) for a, b in pairwise((0, *ends))], 1).tolist()}


def seeds(cell: Fields) -> int:
    """Return how many seeds a cell has: one, if its scorer neither draws nor is calibrated."""
    scorer = cell.get("scorer", "")
    same = scorer and scorer != "random" and find_scorer(scorer)[0].needs == "weights"
    return 1 if same else int(cell.get("seeds", 1))


def code_of(scorer: str | None) -> str:
    """Return a hash of the module that a scorer comes from."""
    if scorer is None:
        return ""
    cls = find_scorer(scorer)[0]
    return hashlib.sha256(inspect.getsource(inspect.getmodule(cls) or cls).encode()).hexdigest()[:12]
