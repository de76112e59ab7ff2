"""Plan: one reduction per dependency group, as frozen data with a JSON form. All that surgery ever sees."""

from __future__ import annotations

import difflib
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


@dataclass(frozen=True)
class Plan:
    """What stays of each dependency group, on one axis or on several.

    groups: `<module path>:<axis>` -> Selection. `model` identifies the model; `made_by` says how the plan was made.
    """

    groups: dict[str, Selection]
    model: dict[str, str] = field(default_factory=dict)
    made_by: dict[str, Any] = field(default_factory=dict)

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that the plan cuts, in its own order."""
        return tuple(dict.fromkeys(axis_of(name) for name in self.groups))

    @property
    def drops(self) -> bool:
        """Whether the plan removes anything at all."""
        return any(s.after < s.before for s in self.groups.values())

    def to_json(self) -> dict[str, Any]:
        """The content of plan.json."""
        return {
            "version": VERSION,
            "model": self.model,
            "axis": ",".join(self.axes),
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
            plan = cls(groups, dict(data.get("model", {})), dict(data.get("made_by", {})))
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
        lines = [f"plan on {', '.join(self.axes)}"]
        lines += [f"  {name:<{width}}  {s.before} -> {s.after}" for name, s in self.groups.items()]
        return "\n".join(lines)


def axis_of(name: str) -> str:
    """The axis of the dependency group `<module path>:<axis>`."""
    return name.rpartition(":")[2]


def check_plan(plan: Plan, graph: SSMGraph, fingerprint: str | None = None) -> None:
    """Raise PlanError unless every reduction of `plan` fits `graph` and, where both are known, the fingerprint.

    A plan that removes nothing is an error too: whoever applies it expects a smaller model.
    """
    made_for = plan.model.get("fingerprint")
    if made_for and fingerprint and made_for != fingerprint:
        raise PlanError(
            f"the plan was made for another model (fingerprint {made_for}, this model has {fingerprint}); "
            "make a plan for this one"
        )
    for name, selection in plan.groups.items():
        group = graph.groups.get(name)
        if group is None:
            near = difflib.get_close_matches(name, graph.groups, n=1, cutoff=0) or [""]
            raise PlanError(f"{name}: the model has no such dependency group; the nearest is {near[0]}")
        _check_selection(name, selection)
        _check_fits(name, selection, group)
        if selection.after % group.multiple_of and selection.after < selection.before:
            raise PlanError(
                f"{name}: keeps {selection.after} units; the model's code needs a multiple of {group.multiple_of}"
            )
        if selection.after == 0:
            raise PlanError(f"{name}: keeps nothing; at least 1 unit has to stay (to drop whole layers: axis block)")
    if not plan.drops:
        raise PlanError("the plan keeps every unit: nothing would be removed; remove something with sparsity or keep")
    _check_modules(plan, graph)


def _check_modules(plan: Plan, graph: SSMGraph) -> None:
    """Whole modules: a mixer has to stay, or it is no state-space model; and attention where there was some, because
    the caches of hybrids count tokens in an attention layer."""
    gone = [
        graph.groups[name].blocks[unit].path
        for name, selection in plan.groups.items()
        for unit in (selection.dropped(0) if graph.groups[name].blocks else ())
    ]
    kinds = {"mixer": graph.layers, "attention layer": [s for s in graph.sites if s.kind == "attention"]}
    for kind, sites in kinds.items() if gone else ():
        paths = [path for site in sites for path in (site.path, *site.aliases)]
        around = [next((g for g in gone if path == g or path.startswith(f"{g}.")), None) for path in paths]
        if paths and all(around):
            raise PlanError(f"the plan drops every {kind}; one has to stay: leave it alone with ignore {around[-1]!r}")


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
    if len(counts) != 1:
        raise PlanError(f"{name}: keeps {sorted(counts)} units; every group needs the same count")
    for keep in selection.keep:
        if any(a >= b for a, b in pairwise(keep)) or (keep and not 0 <= keep[0] <= keep[-1] < selection.before):
            raise PlanError(f"{name}: indices must increase within 0 to {selection.before - 1}")
