"""Plan: one reduction per dependency group, as frozen data with a JSON form. All that surgery ever sees."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from sspruner.errors import PlanError
from sspruner.graph.group import DependencyGroup
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.io.output import atomic_file

VERSION = 1


@dataclass(frozen=True)
class Selection:
    """Keep these units of a dependency group: `keep` holds, per set, increasing indices below `before`."""

    before: int
    keep: tuple[tuple[int, ...], ...]

    @property
    def after(self) -> int:
        """Units kept in every set."""
        return len(self.keep[0])

    def dropped(self, group: int) -> list[int]:
        """The units of one set that go, in increasing order."""
        kept = set(self.keep[group])
        return [unit for unit in range(self.before) if unit not in kept]

    def then(self, second: Selection) -> Selection:
        """One selection that equals this one followed by `second`."""
        return Selection(
            self.before,
            tuple(tuple(mine[i] for i in theirs) for mine, theirs in zip(self.keep, second.keep, strict=True)),
        )


@dataclass(frozen=True)
class Plan:
    """What stays of each dependency group. `model` identifies the model; `made_by` says how the plan was made."""

    axis: str
    groups: dict[str, Selection]
    model: dict[str, str] = field(default_factory=dict)
    made_by: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The content of plan.json."""
        return {
            "version": VERSION,
            "model": self.model,
            "axis": self.axis,
            "groups": {
                name: {"before": s.before, "after": s.after, "keep": [list(k) for k in s.keep]}
                for name, s in self.groups.items()
            },
            "made_by": self.made_by,
        }

    @classmethod
    def from_json(cls, data: Any, where: str = "plan") -> Plan:
        """Inverse of `to_json`. Raises PlanError that names the first malformed field."""
        if not isinstance(data, dict) or data.get("version") != VERSION:
            raise PlanError(f"{where}: not a plan of version {VERSION}")
        try:
            groups = {
                str(name): Selection(_index(g["before"]), tuple(tuple(map(_index, k)) for k in g["keep"]))
                for name, g in data["groups"].items()
            }
            plan = cls(str(data["axis"]), groups, dict(data.get("model", {})), dict(data.get("made_by", {})))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"{where}: malformed plan ({type(error).__name__}: {error})") from error
        for name, selection in plan.groups.items():
            _check_selection(f"{where}: {name}", selection)
        return plan

    def save(self, path: str | Path) -> None:
        """Write plan.json, atomically: one line per dependency group, so that plans can be compared with diff."""
        data = self.to_json()
        lines = [f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in data.pop("groups").items()]
        rest = json.dumps(data, indent=2).removesuffix("\n}")
        with atomic_file(path) as temporary:
            temporary.write_text(rest + ',\n  "groups": {\n' + ",\n".join(lines) + "\n  }\n}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read plan.json. Raises PlanError if it is missing or malformed."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise PlanError(f"plan {path}: cannot be read ({type(error).__name__}: {error})") from error
        return cls.from_json(data, f"plan {path}")

    def __str__(self) -> str:
        width = max(map(len, self.groups), default=0)
        lines = [f"plan on axis {self.axis!r}"]
        lines += [f"  {name:<{width}}  {s.before} -> {s.after}" for name, s in self.groups.items()]
        return "\n".join(lines)


def check_plan(plan: Plan, graph: SSMGraph, fingerprint: str | None = None) -> None:
    """Raise PlanError unless every reduction of `plan` fits `graph` and, where both are known, the fingerprint."""
    made_for = plan.model.get("fingerprint")
    if made_for and fingerprint and made_for != fingerprint:
        raise PlanError(
            f"the plan was made for another model (fingerprint {made_for}, this model has {fingerprint}); "
            "make a plan for this one"
        )
    for name, selection in plan.groups.items():
        group = graph.groups.get(name)
        if group is None:
            raise PlanError(f"{name}: the model has no such dependency group; its first is {next(iter(graph.groups))}")
        if group.axis != plan.axis:
            raise PlanError(f"{name}: the plan says that its axis is {plan.axis!r}")
        _check_selection(name, selection)
        _check_fits(name, selection, group)


def _index(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r} is not an integer")
    return value


def _check_fits(name: str, selection: Selection, group: DependencyGroup) -> None:
    if (selection.before, len(selection.keep)) != (group.units, group.groups):
        raise PlanError(
            f"{name}: the plan starts from {len(selection.keep)} x {selection.before} units, the model has "
            f"{group.groups} x {group.units}; make a plan for this model"
        )


def _check_selection(name: str, selection: Selection) -> None:
    counts = {len(k) for k in selection.keep}
    if len(counts) != 1 or counts == {0}:
        raise PlanError(f"{name}: keeps {sorted(counts)} units; every group needs the same count, at least 1")
    for keep in selection.keep:
        if any(a >= b for a, b in pairwise(keep)) or keep[0] < 0 or keep[-1] >= selection.before:
            raise PlanError(f"{name}: indices must increase within 0 to {selection.before - 1}")
