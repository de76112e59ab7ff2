"""Record of a model's cuts in its config: a loader needs it to build modules of the right sizes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sspruner.axes import axis_of
from sspruner.errors import PlanError
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.graph.text_model import text_config
from sspruner.plans.plan import VERSION, Plan
from sspruner.plans.reduction import Projection, Reduction
from sspruner.surgery.predict import dropped_modules
from sspruner.surgery.slice import cut_layout

RECORD = "sspruner"  # key in config.json
WEIGHTS = "weights"  # subfolder for weights that only `sspruner.load` can read


@dataclass(frozen=True)
class RecordedCut:
    """One cut of a record. `plan` has groups only, since values are in the weights; `biases` were added before it."""

    plan: Plan
    biases: tuple[str, ...] = ()


def record(config: Any, original: dict[str, Any], plan: Plan, graph: SSMGraph, biases: Sequence[str] = ()) -> None:
    """Write a cut into the model's config (key `sspruner`), and set the stock fields that can express the sizes.

    The record is the list of all cuts so far, each in the indices of the model that it was applied to: the loader
    builds the original model and repeats them. Zeros and new values in existing tensors do not change the config.

    original  the config's fields before this cut (`fields`); those that changed are kept in the record
    biases    biases that the cut added
    """
    if config is None:  # a custom model that is not loaded from a config
        return
    if not plan.groups and not biases:
        return
    previous = getattr(config, RECORD, None) or {}
    stock = dict(previous.get("stock", {}))
    _write_sizes(text_config(config), stock, plan, graph)
    sizes = graph.family.config_sizes if graph.family else {}
    for field, value in fields(config).items():
        if field not in sizes and original.get(field) != value:
            stock.setdefault(field, original.get(field))
    cuts = [*previous.get("cuts", []), _line(plan.groups, biases)]
    setattr(config, RECORD, {"version": VERSION, "cuts": cuts, "stock": stock})


def _line(groups: dict[str, Reduction], biases: Sequence[str]) -> dict[str, Any]:
    """Return one cut as JSON. The values of projections are among the weights."""
    return Plan(groups).to_json(digest=False) | ({"biases": [*biases]} if biases else {})


@contextmanager
def noted(config: Any, biases: Sequence[str], projections: Mapping[str, Projection]) -> Iterator[None]:
    """Context manager that records a mask's biases and projectors in the config, so that a saved model loads."""
    previous, changed = getattr(config, RECORD, None), bool(biases or projections)
    if changed:
        cuts = [*(previous or {}).get("cuts", []), _line(dict(projections), biases)]
        setattr(config, RECORD, {"version": VERSION, "stock": {}, **(previous or {}), "cuts": cuts})
    try:
        yield
    finally:
        if changed and previous is None:
            delattr(config, RECORD)
        elif changed:
            setattr(config, RECORD, previous)


def recorded(config: Any) -> list[RecordedCut]:
    """Return the cuts that a config records, in order; empty if none. Raises PlanError if they are malformed."""
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


def take_subfolder(config: Any) -> str:
    """Return the subfolder of the weights that a saved config records, and remove it from the config.

    A model in memory has no folder: where it is saved next, the weights may lie elsewhere. Raises PlanError for names
    that `save` never uses.
    """
    data = getattr(config, RECORD, None) or {}
    folder = data.get("weights", "")
    if folder not in ("", WEIGHTS):
        raise PlanError(f"config.json, key 'sspruner': 'weights' is {str(folder)[:100]!r}; known: '' and {WEIGHTS!r}")
    if "weights" in data:
        setattr(config, RECORD, {key: value for key, value in data.items() if key != "weights"})
    return str(folder)


@contextmanager
def subfolder(config: Any, folder: str) -> Iterator[None]:
    """Context manager that records the subfolder of the weights in the config while it is written."""
    data = getattr(config, RECORD)
    setattr(config, RECORD, {**data, "weights": folder})
    try:
        yield
    finally:
        setattr(config, RECORD, data)


def restore_stock(config: Any) -> None:
    """Restore the stock fields of the model before any cut."""
    for field, value in (getattr(config, RECORD, None) or {}).get("stock", {}).items():
        setattr(text_config(config), field, value)


def fields(config: Any) -> dict[str, Any]:
    """Return a copy of the config's own fields; of a multimodal model those of its language model."""
    return (
        {}
        if config is None
        else {
            k: copy.deepcopy(v) for k, v in vars(text_config(config)).items() if k != RECORD and not k.startswith("_")
        }
    )


def check_recorded(plan: Plan, graph: SSMGraph) -> None:
    """Raise PlanError unless a recorded cut fits the model that has been built so far."""
    for name, selection in plan.groups.items():
        group = graph.groups.get(name)
        if group is None or (group.units, group.groups) != (selection.before, selection.sets):
            raise PlanError(f"config.json: records a cut of {name} that does not fit the model that it describes")


def _write_sizes(config: Any, stock: dict[str, Any], plan: Plan, graph: SSMGraph) -> None:
    """Set the stock fields for sizes if one value fits every layer; else restore their original values.

    With original values, stock classes refuse the checkpoint instead of reading it wrongly. The rows of a projected
    state would fit, so its field is the number of coordinates: stock classes would read the dense model otherwise.
    """
    if graph.family is None:
        return
    removed = tuple(f"{path}." for path in dropped_modules(plan, graph))
    sites = [site for site in graph.sites if not f"{site.path}.".startswith(removed)]
    layouts = {site.path: cut_layout(site, plan, graph) for site in sites}
    values = {field: found for field, found in graph.family.stock_sizes(layouts).items() if found}
    for field in graph.family.config_repeats:
        vars(config).pop(field, None)
    uniform = all(len(found) == 1 for found in values.values())
    projected = [layout for layout in layouts.values() if layout.is_projected]
    state = {f: size for f, size in graph.family.config_sizes.items() if any("state" in term for term in size)}
    coordinates = {f: min(layout.total(size) for layout in projected) for f, size in state.items() if projected}
    for field, value in values.items():
        stock.setdefault(field, getattr(config, field))
        setattr(config, field, coordinates.get(field, value.pop() if uniform else stock[field]))
        if getattr(config, field) == stock[field]:
            del stock[field]
    factors = [s.before / s.after for name, s in plan.groups.items() if axis_of(name) == "hidden"]
    for factor in factors if graph.family.config_epsilon else ():
        epsilon = getattr(config, graph.family.config_epsilon)
        setattr(config, graph.family.config_epsilon, epsilon * factor)
