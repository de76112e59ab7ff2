"""Experiments of recipes/: scorers x cuts, each cell a `sspruner.Recipe`, measured on text that no scorer saw.

A file names the table that is drawn (a function of tables.py) and one section or several: the models, fields that all
recipes have (base), rows and cuts with the fields of each, how many seeds, what is observed and what is reported. A
section that is `once` scores each row once on the dense model and plans every cut from that. Rows may have `observed`,
`models` and `cuts` of their own. Other files are recipes of commands (commands.py).

Every cell is kept in the work folder, and made again if its recipe, the sizes or the scorer's code changed, or if it
failed. Changes of the engine are not noticed: remove the folder.
"""

from __future__ import annotations

import copy
import datetime
import hashlib
import inspect
import platform
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import commands
import tables as drawn
import torch
import yaml
from common import Made, Subject, by_token, file_name, kept, progress

import sspruner
from sspruner.scoring.choice import candidates
from sspruner.scoring.known import find_scorer

Fields = dict[str, Any]
OWN = ("observed", "models", "cuts")  # keys of a row that are no fields of its recipe
BUDGET = ("scorer", "axis", "options", "one_shot", "seed")  # fields of a recipe that are no fields of a plan


@dataclass(frozen=True)
class Section:
    """Some rows and cuts on some models.

    observed, reported: {file, windows}; chosen: text on which cells are measured, too. rows: "all" tries every scorer
    of the axis. show: what the table wants to know.
    """

    models: tuple[str, ...]
    rows: dict[str, Fields] | str
    cuts: dict[str, Fields]
    base: Fields = field(default_factory=dict)
    once: bool = False
    seeds: int = 1
    observed: Fields = field(default_factory=dict)
    reported: Fields = field(default_factory=dict)
    chosen: Fields = field(default_factory=dict)
    passages: int = 0
    show: Fields = field(default_factory=dict)

    @property
    def axis(self) -> str:
        """The axis that is cut."""
        return str(self.base.get("axis", "state"))

    def rows_of(self, model: str) -> dict[str, Fields]:
        """Return the rows of one model."""
        if isinstance(self.rows, str):
            return {name: {"scorer": name} for name in candidates(self.axis, "select")} | self.show["beside"]
        return {label: row for label, row in self.rows.items() if model in row.get("models", self.models)}

    def cuts_of(self, row: Fields) -> dict[str, Fields]:
        """Return the cuts of one row."""
        return {label: cut for label, cut in self.cuts.items() if label in row.get("cuts", self.cuts)}

    def fields(self, row: Fields, cut: Fields, seed: int = 0) -> Fields:
        """Return the fields of a cell's recipe."""
        found = self.base | {key: value for key, value in row.items() if key not in OWN} | cut
        if "pattern" in found:
            found.pop("granularity", None)  # a pattern is one
        return found | {"seed": seed, "mode": "mask"}

    def quick(self) -> Section:
        """Return a little of it: the first model, two rows, one cut, two windows."""
        few = {key: {**getattr(self, key), "windows": 2} for key in ("observed", "reported", "chosen")}
        few = {key: value for key, value in few.items() if getattr(self, key)}
        rows = self.rows if isinstance(self.rows, str) else dict(list(self.rows.items())[:2])
        cuts = dict(list(self.cuts.items())[1:2] or self.cuts)
        more: Fields = {"passages": min(self.passages, 4), "models": self.models[:1], "seeds": 1}
        return replace(self, rows=rows, cuts=cuts, **few, **more)


@dataclass(frozen=True)
class Experiment:
    """A file of recipes/."""

    table: str
    sections: tuple[Section, ...]

    @classmethod
    def load(cls, file: Path) -> Experiment:
        """Read an experiment; what stands beside `sections` holds for all of them."""
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
        data.pop("shared", None)  # only for anchors
        table, sections = data.pop("table"), data.pop("sections", [{}])
        return cls(
            table, tuple(Section(**{**data, **one, "models": tuple({**data, **one}["models"])}) for one in sections)
        )


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
        """The rows that there are."""
        return list(dict.fromkeys(label for label, _ in self.cells))

    def mean(self, row: str, cut: str, key: str) -> torch.Tensor | None:
        """Return the mean over seeds, by window or passage; None if no seed has any."""
        good = [getattr(cell, key) for cell in self.cells.get((row, cut), ()) if key in cell]
        return torch.stack(good).mean(0) if good else None


def tables(s: Any) -> Made:
    """Run an experiment, and draw its table; or a command's recipe."""
    if hasattr(commands, s.file.stem):
        command: Made = getattr(commands, s.file.stem)(s)
        return command
    experiment = Experiment.load(s.file)
    if models := getattr(s, "models", None):
        sections = [replace(part, models=tuple(m for m in part.models if m in models)) for part in experiment.sections]
        experiment = replace(experiment, sections=tuple(part for part in sections if part.models))
    subjects: dict[str, Subject] = {}
    found = []
    for section in experiment.sections[: 1 if s.quick else None]:
        section = section.quick() if s.quick else section
        for name in section.models:
            if name not in subjects:
                subjects = {name: Subject(name, s.data)}  # one at a time
            work = s.work / f"{s.file.stem}{'-quick' * s.quick}" / name
            found.append(measured(subjects[name], section, work))
    made: Made = getattr(drawn, experiment.table)(found)
    return made


def measured(subject: Subject, section: Section, work: Path) -> Found:
    """Measure every cell of a section on one model; those of a row and a seed together."""
    texts = {
        key: subject.text(**source(getattr(section, key))) for key in ("reported", "chosen") if getattr(section, key)
    }
    asked = subject.passages(section.passages) if section.passages else []
    sizes = [section.observed, section.reported, section.chosen, section.passages]
    seen: dict[Any, sspruner.Calibration] = {}
    dense: Fields = {}
    cells: dict[tuple[str, str], list[Cell]] = {}

    def observed(file: str, seed: int) -> sspruner.Calibration:
        if (file, seed) not in seen:
            seen[file, seed] = subject.text(file, section.observed["windows"], seed=seed)
        return seen[file, seed]

    def measure(versions: list[Any]) -> list[Fields]:
        first, others = subject.measure(versions, texts.get("reported"), asked)
        dense.update(numbers(first))
        records = [numbers(values) for values in others]
        if "chosen" in texts:
            chosen = subject.measure(versions, texts["chosen"])[1]
            return [r | {"chosen": numbers(c)["nll"]} for r, c in zip(records, chosen, strict=True)]
        return records

    def fill(label: str, row: Fields, seed: int) -> dict[str, Fields]:
        """All cells of a row and a seed."""
        data, records, versions, plans = observed(row.get("observed", section.observed["file"]), seed), {}, {}, {}
        for cut, budget in section.cuts_of(row).items():
            try:
                versions[cut], plans[cut] = version_of(subject, section, section.fields(row, budget, seed), data)
            except Exception as error:  # a broken scorer must not take the other rows with it
                said = "" if isinstance(error, sspruner.SSPrunerError) else f"{type(error).__name__}: "
                records[cut] = {"error": f"{said}{error}"}
        for cut, record in zip(versions, measure(list(versions.values())) if versions else [], strict=True):
            records[cut] = record | {"kept": sorted(plans[cut])}
            progress(f"{subject.name} {section.axis} | {label} | seed {seed} | {cut}: {cost(record)}")
        machine = f"{platform.machine()}, {torch.get_num_threads()} torch threads, torch {torch.__version__}"
        made = {"date": str(datetime.date.today()), "machine": machine}
        return {cut: records[cut] | {"made": made} for cut in section.cuts_of(row)}

    for label, row in section.rows_of(subject.name).items():
        scorer = section.fields(row, {})["scorer"]
        for seed in range(1 if fixed(scorer) else section.seeds):
            recipes = {cut: section.fields(row, budget, seed) for cut, budget in section.cuts_of(row).items()}
            file = work / section.axis / f"{file_name(label)}.{seed}.json"
            key = [recipes, row.get("observed"), sizes, code_of(scorer)]
            record = kept(file, key, lambda label=label, row=row, seed=seed: fill(label, row, seed))
            for cut, cell in record.items():
                cells.setdefault((label, cut), []).append(Cell(cell))
    if not dense:  # all cells were there
        measure([])
    return Found(subject.name, section, Cell(dense), cells)


def version_of(subject: Subject, section: Section, how: Fields, data: sspruner.Calibration) -> tuple[Any, set[int]]:
    """Return a version of the model for `measure`, and what its dependency groups keep."""
    if section.once:
        scoring = {key: how[key] for key in ("axis", "options", "seed") if key in how}
        budget = {key: value for key, value in how.items() if key not in (*BUDGET, "mode")}
        plan = subject.plan(data, how["scorer"], **scoring, **budget)
        sizes = {name: group.units for name, group in subject.graph.on_axis(section.axis).items()}
        return subject.masked(plan), sorted((sizes | {n: r.after for n, r in plan.groups.items()}).values())
    model = copy.deepcopy(subject.model)
    result = sspruner.prune(model, sspruner.Recipe.of(**how), calibration=data, tokenizer=subject.tokenizer)
    return lambda: nullcontext(model), {selection.after for selection in result.plan.groups.values()}


def numbers(values: Any) -> Fields:
    """Return what was measured, as JSON: nll and kl by window, nats per token; word_nll and word by passage."""
    found: Fields = {}
    if values.text is not None:
        nll, kl = by_token(values)
        found |= {"nll": nll.tolist(), "kl": kl.tolist()}
    if "lambada_nll" in values.items:
        found |= {"word_nll": values.items["lambada_nll"].tolist(), "word": values.items["lambada_accuracy"].tolist()}
    return found


def cost(record: Fields) -> str:
    """Return the mean of what a cell holds first, for progress."""
    first = next(iter(record.values()))
    return f"{sum(first) / len(first):.4f} nats"


def source(text: Fields) -> Fields:
    """Return the arguments of Subject.text."""
    return {"source": text["file"], "windows": text["windows"]}


def fixed(scorer: str) -> bool:
    """Tell whether a scorer neither draws nor is calibrated."""
    return scorer != "random" and find_scorer(scorer)[0].needs == "weights"


def code_of(scorer: str) -> str:
    """Return a hash of the module that a scorer comes from."""
    cls = find_scorer(scorer)[0]
    return hashlib.sha256(inspect.getsource(inspect.getmodule(cls) or cls).encode()).hexdigest()[:12]
