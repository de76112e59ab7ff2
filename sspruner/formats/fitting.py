"""Check whether a model, or the result of a plan, fits a runtime target.

Its sizes must obey the target's rules, and a stock config must be able to describe it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sspruner.compute.device import offloaded
from sspruner.errors import InputError, ModelError, PlanError
from sspruner.formats.gguf import gguf_difference
from sspruner.formats.native import native_fields
from sspruner.formats.stock import REFUSALS, nearest_stock, stock_difference
from sspruner.formats.targets import WAYS, Fit, Target, names, target
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.graph.trace import trace
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Selection
from sspruner.surgery.record import fields, record
from sspruner.surgery.slice import slice_model
from sspruner.surgery.tensors import add_bias, new_biases

if TYPE_CHECKING:
    from sspruner.budgets.budget import ResolvedBudget


@dataclass(frozen=True)
class Subject:
    """A model, its graph, and where it differs from what its stock class builds from its config, "" if nowhere."""

    model: Any
    graph: SSMGraph
    unlike: str

    @classmethod
    def of(cls, model: Any) -> Subject:
        """Describe a model, which may be on the meta device, since only sizes count."""
        graph = trace(model)
        return cls(model, graph, stock_difference(model) if graph.family else "")


def check_fits(model: Any, runtime: Target) -> None:
    """Raise ModelError, with the reason and the nearest cut, unless the target supports the model as it is."""
    if why := unfit(Subject.of(model), runtime):
        raise ModelError(why)


def unfit(subject: Subject, runtime: Target) -> str:
    """Return why a target does not support a model, and the nearest cut that it supports; "" if it does."""
    if why := runtime.serves(subject.graph):
        return f"{runtime.name} cannot take this model: {why}"
    if wrong := runtime.misreads(subject.graph, subject.model.config):
        return f"{runtime} cannot take this model: {'; '.join(wrong)}"
    if why := _unsayable(subject, runtime):
        return why
    if broken := runtime.refuses(subject.graph):
        return f"{runtime} cannot take these sizes: {'; '.join(broken)}. {_next_cut(subject.graph, runtime)}"
    return ""


def _unsayable(subject: Subject, runtime: Target) -> str:
    """Return why the file or config that a target reads cannot describe a model, whatever the rules; "" if it can."""
    if runtime.writer == "gguf":
        return gguf_difference(subject.model)
    if subject.unlike:
        pad = padded_fits(subject.graph, runtime) if runtime.writer == "hf" else ""
        return f"{runtime} cannot take this cut: {subject.unlike}. {nearest_stock(subject.model)}{pad or WAYS}"
    if runtime.writer == "mamba-ssm":
        try:
            native_fields(subject.model)
        except ModelError as error:
            return str(error)
    return ""


def check_cut(model: Any, plan: Plan, graph: SSMGraph, runtime: Target) -> None:
    """Raise ModelError unless the target supports the result of applying `plan` to `model`. Nothing is changed."""
    check_fits(after(model, plan, graph), runtime)


@torch.no_grad()
def after(model: Any, plan: Plan, graph: SSMGraph) -> Any:
    """Return a copy of `model` on the meta device, cut by `plan`, with the cut in its config. graph: the model's."""
    small, biases = blueprint(model), new_biases(model, plan.updates)
    before = fields(small.config)
    for name in biases:
        add_bias(small, name)
    graph = trace(small) if biases else graph
    config = small.config
    slice_model(small, plan, graph)
    record(config, before, plan, graph, biases)
    return small


def blueprint(model: Any) -> Any:
    """Return a copy of a model on the meta device: its modules and its config without values."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    memo[id(offloaded(model))] = None  # the copy reads nothing from disk
    return copy.deepcopy(model, memo)


def check_request(runtime: Target, budget: ResolvedBudget, refit: str, has_basis: bool) -> None:
    """Raise InputError for settings that no stock config can express, whatever the scores."""
    if has_basis:
        raise InputError(
            f"target {runtime.name}: a state in a basis of its own has tensors that it does not know; use --basis "
            "select. export --to hf-remote writes such a model with the code that it needs"
        )
    if budget.allocation != "uniform":
        raise InputError(
            f"target {runtime.name}: takes one size for all layers, which allocation {budget.allocation} does not "
            "give; use uniform, or uniform-best with a limit of damage"
        )
    if refit == "bias":
        raise InputError(f"target {runtime.name}: refit bias adds biases that its config cannot say; use refit output")


def trial(graph: SSMGraph, counts: Mapping[str, int]) -> Plan:
    """Return a plan with these counts that keeps the first units of every set, to be tried before there are scores.

    Blocks are left out: whether a config can describe the result depends on which are removed.
    """
    cut = {name: graph.groups[name] for name, n in counts.items() if n < graph.groups[name].units}
    return Plan(
        {
            name: Selection(group.units, (tuple(range(counts[name])),) * group.groups)
            for name, group in cut.items()
            if group.axis != "block"
        }
    )


def padded_fits(graph: SSMGraph, runtime: Target) -> str:
    """Describe what hf-padded would make of a model whose layers differ, by the target's rules; else "".

    Only an export proves it.
    """
    assert graph.family is not None
    layouts = [site.layout for site in graph.layers]
    if any(layout.is_projected for layout in layouts) or all(layout.sizes == layouts[0].sizes for layout in layouts):
        return ""
    largest = {dim: max(layout.sizes[dim] for layout in layouts) for dim in layouts[0].sizes}
    broken = runtime.broken(graph.family.name, layouts[0].resized(largest))
    if broken:
        return f"Padded to the largest layer it would not fit either: {broken[0].why}"
    return f"export --to hf-padded --target {runtime.name} pads all layers to the largest with zeros, which may fit"


def _next_cut(graph: SSMGraph, runtime: Target) -> str:
    """Describe the smallest further cut of one axis to sizes that fit."""
    fit = Fit(runtime, graph)
    sizes_of = {axis: fit.takes(axis) for axis in graph.axes if axis != "block"}
    cuts = [f"--axis {axis} --keep {sizes[-1]}" for axis, sizes in sizes_of.items() if sizes]
    return f"The nearest cut that it takes: {' or '.join(cuts)}" if cuts else "No cut of one axis makes it fit"


@dataclass(frozen=True)
class Offer:
    """Cuts of one model that a target supports.

    reason   why the target does not support the model in its current form, "" if it does
    notes    remarks on slower paths
    axes     for each axis, the sizes to which it alone can be cut
    refused  for each axis that cannot be cut, the reason
    """

    target: Target
    reason: str
    notes: tuple[str, ...]
    axes: Mapping[str, tuple[int, ...]]
    refused: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object, with sizes as runs of [first, last, step]."""
        return {
            "tp": self.target.tp,
            "how": self.target.how,
            "checked": self.target.checked,
            "fits": not self.reason,
            "reason": self.reason,
            "notes": list(self.notes),
            "axes": {axis: runs(sizes) for axis, sizes in self.axes.items()},
            "refused": dict(self.refused),
        }


def offers(model: Any, only: Target | None = None) -> list[Offer]:
    """Return what each target, or `only` one, supports of a model, which may be on the meta device.

    On each axis only the smallest cut is tried; the rules decide on the others. Of the blocks the last is tried.
    """
    subject = Subject.of(model)
    tried: dict[tuple[str, int], Subject | str] = {}
    return [_offer(subject, one, tried) for one in ([only] if only else map(target, names()))]


def _offer(subject: Subject, runtime: Target, tried: dict[tuple[str, int], Subject | str]) -> Offer:
    why, fit = unfit(subject, runtime), Fit(runtime, subject.graph)
    if runtime.serves(subject.graph) or runtime.misreads(subject.graph, subject.model.config):
        return Offer(runtime, why, (), {}, {})
    axes, refused, notes = {}, {}, runtime.notes(subject.graph, subject.model.config)
    for axis in subject.graph.axes:
        sizes = fit.takes(axis)
        if not sizes:
            if because := fit.takes_none(axis):
                refused[axis] = because
            continue
        key = axis, sizes[-1] if runtime.writer == "mamba-ssm" else 0  # for stock classes one size represents all
        if key not in tried:
            tried[key] = _cut_axis(subject, axis, sizes[-1])
        small = tried[key]
        if because := small if isinstance(small, str) else _unsayable(small, runtime):
            refused[axis] = f"depends on which go; the last: {because}" if axis == "block" else because
        else:
            axes[axis] = tuple(sizes)
            notes += fit.slower(axis, sizes)
    return Offer(runtime, why, tuple(notes), axes, refused)


def _cut_axis(subject: Subject, axis: str, n: int) -> Subject | str:
    """Return the model with one axis cut to n units in every layer, or the reason why it cannot be."""
    groups = subject.graph.on_axis(axis).items()
    plan = Plan({name: Selection(g.units, (tuple(range(n)),) * g.groups) for name, g in groups if n < g.units})
    try:
        return Subject.of(after(subject.model, plan, subject.graph))
    except (PlanError, *REFUSALS) as error:
        return " ".join(str(error).split())[:200]


def runs(sizes: tuple[int, ...]) -> list[list[int]]:
    """Compress increasing sizes into runs of [first, last, step]."""
    compressed: list[list[int]] = []
    for n in sizes:
        last = compressed[-1] if compressed else None
        if last and (last[0] == last[1] or n - last[1] == last[2]):
            last[1], last[2] = n, n - last[1]
        else:
            compressed.append([n, n, 1])
    return compressed
