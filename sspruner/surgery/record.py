"""The cuts in the config: what a loader needs to build modules of the right sizes before it reads any weight."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sspruner.errors import PlanError
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.plans.plan import VERSION, Plan, axis_of
from sspruner.plans.reduction import Projection, Reduction
from sspruner.surgery.predict import dropped_modules
from sspruner.surgery.slice import cut_layout

RECORD = "sspruner"  # key in config.json
WEIGHTS = "weights"  # subfolder for weights that only `sspruner.load` can read


@dataclass(frozen=True)
class RecordedCut:
    """One cut of a record: `plan` has groups alone, for values are in the weights; `biases` were added before it."""

    plan: Plan
    biases: tuple[str, ...] = ()


def record(config: Any, original: dict[str, Any], plan: Plan, graph: SSMGraph, biases: Sequence[str] = ()) -> None:
    """Write into a cut model's config what was cut (key `sspruner`), and the stock fields where they can express it.

    The record is the list of all cuts so far, each in the indices of the model that it was applied to: the loader
    builds the original model and repeats them. original: the config's fields before this cut (`fields`); those that
    changed are kept in the record. biases: those that the cut added. Zeros and new values in tensors that the model
    had anyway leave the config as it was.
    """
    if config is None:  # a model of its own kind, that is not loaded from a config
        return
    if not plan.groups and not biases:
        return
    previous = getattr(config, RECORD, None) or {}
    stock = dict(previous.get("stock", {}))
    _write_sizes(config, stock, plan, graph)
    sizes = graph.family.config_sizes if graph.family else {}
    for field, value in fields(config).items():
        if field not in sizes and original.get(field) != value:
            stock.setdefault(field, original.get(field))
    cuts = [*previous.get("cuts", []), _line(plan.groups, biases)]
    setattr(config, RECORD, {"version": VERSION, "cuts": cuts, "stock": stock})


def _line(groups: dict[str, Reduction], biases: Sequence[str]) -> dict[str, Any]:
    """One cut as JSON. The values of projections are among the weights."""
    return Plan(groups).to_json(digest=False) | ({"biases": [*biases]} if biases else {})


@contextmanager
def noted(config: Any, biases: Sequence[str], projections: Mapping[str, Projection]) -> Iterator[None]:
    """While open, the config records biases and projectors that a mask has added: what is saved can be loaded."""
    before, more = getattr(config, RECORD, None), bool(biases or projections)
    if more:
        cuts = [*(before or {}).get("cuts", []), _line(dict(projections), biases)]
        setattr(config, RECORD, {"version": VERSION, "stock": {}, **(before or {}), "cuts": cuts})
    try:
        yield
    finally:
        if more and before is None:
            delattr(config, RECORD)
        elif more:
            setattr(config, RECORD, before)


def recorded(config: Any) -> list[RecordedCut]:
    """The cuts that a config records, in order; empty if it records none. Raises PlanError if they are malformed."""
    data = getattr(config, RECORD, None)
    if not data:
        return []
    where = "config.json, key 'sspruner'"
    if not isinstance(data, dict) or data.get("version") != VERSION:
        raise PlanError(f"{where}: not a record of version {VERSION}")
    for key, kind in {"cuts": list, "stock": dict}.items():
        if not isinstance(data.get(key), kind):
            raise PlanError(f"{where}: not a record of version {VERSION}: {key!r} is not a {kind.__name__}")
    cuts = []
    for cut in data["cuts"]:
        plan, biases = Plan.from_json(cut, where), cut.get("biases", [])
        if not isinstance(biases, list) or not all(isinstance(name, str) for name in biases):
            raise PlanError(f"{where}: not a record of version {VERSION}: 'biases' are not a list of names")
        cuts.append(RecordedCut(plan, tuple(biases)))
    return cuts


def weights_subfolder(config: Any) -> str:
    """The subfolder with the weights that a config records. Raises PlanError for any but those that `save` makes."""
    folder = (getattr(config, RECORD, None) or {}).get("weights", "")
    if folder not in ("", WEIGHTS):
        raise PlanError(f"config.json, key 'sspruner': 'weights' is {str(folder)[:100]!r}; known: '' and {WEIGHTS!r}")
    return str(folder)


def restore_stock(config: Any) -> None:
    """Give a config the stock fields of the model that was never cut."""
    for field, value in (getattr(config, RECORD, None) or {}).get("stock", {}).items():
        setattr(config, field, value)


def fields(config: Any) -> dict[str, Any]:
    """The config's own fields, copied."""
    return (
        {}
        if config is None
        else {k: copy.deepcopy(v) for k, v in vars(config).items() if k != RECORD and not k.startswith("_")}
    )


def check_recorded(plan: Plan, graph: SSMGraph) -> None:
    """Raise PlanError unless a recorded cut fits the model that has been built so far."""
    for name, selection in plan.groups.items():
        group = graph.groups.get(name)
        if group is None or (group.units, group.groups) != (selection.before, selection.sets):
            raise PlanError(f"config.json: records a cut of {name} that does not fit the model that it describes")


def _write_sizes(config: Any, stock: dict[str, Any], plan: Plan, graph: SSMGraph) -> None:
    """The stock fields for sizes: all of them where one value serves every layer, else their original values.

    With original values left in place, stock classes refuse the checkpoint instead of reading it wrongly.
    """
    if graph.family is None:
        return
    gone = tuple(f"{path}." for path in dropped_modules(plan, graph))
    layouts = [cut_layout(site, plan, graph) for site in graph.layers if not f"{site.path}.".startswith(gone)]
    values = {f: {layout.stock_total(size) for layout in layouts} for f, size in graph.family.config_sizes.items()}
    uniform = all(len(v) == 1 for v in values.values())
    for field, value in values.items():
        stock.setdefault(field, getattr(config, field))
        setattr(config, field, value.pop() if uniform else stock[field])
        if getattr(config, field) == stock[field]:
            del stock[field]
    factors = [s.before / s.after for name, s in plan.groups.items() if axis_of(name) == "hidden"]
    for factor in factors if graph.family.config_epsilon else ():
        epsilon = getattr(config, graph.family.config_epsilon)
        setattr(config, graph.family.config_epsilon, epsilon * factor)
