"""Reconstruct: after a cut, train what stays of each cut module to put out what the dense module puts out.

Block reconstruction in the model's own shape. The modules are taken in the order in which the model runs them. The
input is the stream of the cut model, reconstructed so far; the target is the output of the dense module on that same
input; what is trained are the elements of the cut units that stay (`trained.py`). A module keeps its new values only if
they lower the geometric mean of the errors on held-out text of the calibration and on text that the model itself has
written.

The word is that of Li et al., BRECQ, arXiv 2102.05426.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from sspruner.axes import ELEMENT_AXES, WHOLE_MODEL, axis_of
from sspruner.calibrate.gradients import check_differentiable
from sspruner.calibrate.replay import Replay
from sspruner.calibrate.seen import Seen
from sspruner.calibrate.sources import Calibration, Progress
from sspruner.compute.device import moved, resident
from sspruner.compute.precision import in_fp32
from sspruner.compute.processes import rank, world
from sspruner.compute.quick import quick_on_cpu
from sspruner.compute.quick_scan import quick_scans, quick_streams
from sspruner.errors import InputError
from sspruner.files.journal import Journal
from sspruner.graph.site import Site, within
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.plans.plan import Plan, part_of
from sspruner.pruning.fit import Lesson, fit
from sspruner.pruning.reconstruct_notes import Layer, note, resumed
from sspruner.pruning.student import Call, Student, frozen, output
from sspruner.pruning.trained import Trained, trained_elements
from sspruner.recipes.parts import Reconstruction
from sspruner.surgery.mask import masked
from sspruner.surgery.project import basis_of, install, sliced
from sspruner.surgery.tensors import tensor

HELD_OUT = 8  # one of so many windows is held out
TEXT, OWN = "text", "own text"  # kinds of held-out windows: calibration text, and text sampled from the model
UNFIT = {  # axes on which no cut module can be compared with its dense one on the same input
    **dict.fromkeys(WHOLE_MODEL, "no cut module stays whose dense output could be reproduced on the same input"),
    **dict.fromkeys(ELEMENT_AXES, "zeros are spread over whole tensors: train what stays with `sspruner train`"),
}


@dataclass(frozen=True)
class Place:
    """Where and how a reconstruction runs; nothing here changes its values."""

    device: torch.device
    journal: Journal | None = None
    progress: Progress | None = None


@dataclass
class _Module:
    """One cut module during the pass: its site, its paths in the order of the calls, and what it was given so far."""

    site: Site
    paths: tuple[str, ...]
    calls: dict[int, Call] = field(default_factory=dict)  # by number of the window, counted on over the paths


def check_axes(axes: Sequence[str]) -> None:
    """Raise InputError for an axis on which nothing can be reconstructed, with the reason."""
    for axis in axes:
        if axis in UNFIT:
            raise InputError(f"refit reconstruct, axis {axis}: {UNFIT[axis]}")


def check_windows(
    model: nn.Module, groups: Iterable[str], graph: SSMGraph, data: Calibration, settings: Reconstruction
) -> None:
    """Raise InputError for axes that cannot be reconstructed, and for calibration text that is too short.

    Every row that is trained has as many unknowns as it has columns; each wants a token or more. Raises ModelError for
    weights without a gradient (quantised, or made in inference mode).
    """
    groups = list(groups)
    check_axes([axis_of(name) for name in groups])
    check_differentiable(model)
    count = min(settings.refit_windows, len(data.tokens))
    if count < max(2, world()):
        raise InputError(
            f"refit reconstruct: {count} calibration sequences; it wants {max(2, world())} or more, to train on and to "
            "hold out, one or more for each process: give more samples"
        )
    tokens = int(data.mask[:count].sum())
    members = [member for name in groups for member in graph.groups[name].members if member.counted]
    widths = {m.tensor: tensor(model, m.tensor).shape[-1] for m in members if tensor(model, m.tensor).ndim > 1}
    widest = max(widths, key=lambda name: widths[name], default="")
    if widest and tokens < widths[widest]:
        raise InputError(
            f"refit reconstruct: {tokens:,} calibration tokens for {widths[widest]:,} unknowns in each row of "
            f"{widest}: give {-(-widths[widest] // data.tokens.shape[1])} sequences or more (--refit-windows)"
        )


def own_windows(data: Calibration, settings: Reconstruction) -> int:
    """Return how many windows of the model's own text are held out: as many as of the calibration text."""
    return max(1, min(settings.refit_windows, len(data.tokens)) // (2 * HELD_OUT))


@dataclass(frozen=True)
class _Job:
    """What does not change during the pass.

    numbers    of the windows of this process, in the order of the batches of `cut`
    windows    how many windows there are, over all processes
    held_out   kind of text -> numbers of windows
    deadline   time at which training ends, on `time.monotonic`; None for never
    """

    model: nn.Module
    graph: SSMGraph
    cut: Replay
    numbers: Sequence[int]
    windows: int
    held_out: Mapping[str, Sequence[int]]
    steps: int
    seed: int
    deadline: float | None


@torch.no_grad()
def reconstruct(
    model: nn.Module,
    plan: Plan,
    graph: SSMGraph,
    data: Calibration,
    own: torch.Tensor | None,
    settings: Reconstruction,
    place: Place,
) -> tuple[Plan, dict[str, Layer]]:
    """Return `plan` with new values of what stays of the cut modules, and the outcome for each module.

    The model is left as it was. data: the calibration text, of which at most `settings.refit_windows` windows are used.
    own: tokens (S, T) sampled from the model, None to hold out calibration text alone.
    """
    check_axes(plan.axes)
    windows, held_out = _windows(data, own, settings)
    numbers = range(rank(), len(windows), world())
    deadline = None if settings.refit_minutes is None else time.monotonic() + 60 * settings.refit_minutes
    modules = _cut_modules(plan, graph)
    with quick_on_cpu(model, place.device), quick_streams(model, place.device):
        cut = Replay(model, graph, [windows[n] for n in numbers], place.device)
        job = _Job(model, graph, cut, numbers, len(windows), held_out, settings.refit_steps, data.seed, deadline)
        done, plan, layers = resumed(place.journal, plan, cut)
        for number, block in enumerate(cut.blocks[done:], done):
            before = plan
            with resident(model, block):
                for module, path in _in_order_of_calls(job, plan, block, modules):
                    _observe(job, plan, module, block, path)
                    if path != module.paths[-1]:
                        continue  # a shared module is trained on all its calls
                    if place.progress:
                        place.progress(f"reconstructing {module.site.path}", len(layers), len(modules))
                    left = len(modules) - len(layers)
                    plan, layers[module.site.path] = _reconstructed(job, plan, module, block, left)
                with masked(model, part_of(plan, graph, block), graph):
                    cut.advance(block)
            plan = note(place.journal, number, before, plan, layers, cut)
    if place.progress:
        place.progress("reconstructing", len(modules), len(modules))
    return plan, layers


def _windows(
    data: Calibration, own: torch.Tensor | None, settings: Reconstruction
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], dict[str, list[int]]]:
    """Return tokens and mask, (1, T) each, of all windows, and the numbers of those that are held out.

    One of HELD_OUT windows is held out; with text of the model's own, only half as many, beside as many of its own.
    Windows that repeat held-out text are left out. Raises InputError if none is left to train on.
    """
    tokens, mask, count = data.tokens, data.mask, min(settings.refit_windows, len(data.tokens))
    every = HELD_OUT if own is None else 2 * HELD_OUT
    apart = torch.zeros(count, dtype=torch.bool)
    apart[list(range(every - 1, count, every)) or [count - 1]] = True
    kept = apart | ~Seen.of(tokens[:count][apart], mask[:count][apart]).among(tokens[:count], mask[:count])
    if bool(apart[kept].all()):
        raise InputError("refit reconstruct: every calibration sequence repeats one that is held out: give other text")
    count, held_out = int(kept.sum()), {TEXT: apart[kept].nonzero().flatten().tolist()}
    texts = (part[: len(kept)][kept][:, None].clone() for part in (tokens, mask))  # they may be of inference mode
    windows = [*zip(*texts, strict=True)]
    if own is not None:
        held_out[OWN] = list(range(count, count + len(own)))
        windows += [(tokens, torch.ones_like(tokens, dtype=torch.bool)) for tokens in own[:, None]]
    return windows, held_out


def _cut_modules(plan: Plan, graph: SSMGraph) -> dict[str, _Module]:
    """Return the modules of which the plan removes units, by path."""
    cut = {name.rpartition(":")[0] for name, reduction in plan.groups.items() if reduction.after < reduction.before}
    return {site.path: _Module(site, (site.path, *site.aliases)) for site in graph.sites if site.path in cut}


def _in_order_of_calls(job: _Job, plan: Plan, block: str, modules: Mapping[str, _Module]) -> list[tuple[_Module, str]]:
    """Return the modules inside a block, with their paths there, in the order in which the block calls them."""
    inside = {path: module for module in modules.values() for path in module.paths if within(path, block)}
    if len(inside) < 2:
        return [(module, path) for path, module in inside.items()]
    order: list[str] = []
    handles = [
        job.model.get_submodule(path).register_forward_pre_hook(lambda *_, path=path: order.append(path))
        for path in inside
    ]
    try:
        with masked(job.model, part_of(plan, job.graph, block), job.graph), job.cut.on_device(block):
            job.cut.run(block, 0, job.cut.hidden[0])
    finally:
        for handle in handles:
            handle.remove()
    return [(inside[path], path) for path in order]


def _observe(job: _Job, plan: Plan, module: _Module, block: str, path: str) -> None:
    """Note what one call of a module is given, in the stream of the cut model, for every window of this process."""
    first = module.paths.index(path) * job.windows  # windows of a shared module's later calls have numbers of their own
    with masked(job.model, part_of(plan, job.graph, block), job.graph), job.cut.on_device(block):
        for batch, number in enumerate(job.numbers):
            args, kwargs = job.cut.arguments(block, path, batch)
            home = torch.device("cpu")
            module.calls[first + number] = Call(moved(args, home), moved(kwargs, home), job.cut.masks[batch])


def _reconstructed(job: _Job, plan: Plan, module: _Module, block: str, left: int) -> tuple[Plan, Layer]:
    """Train one module on all its calls. Returns the plan with its new values, and the outcome.

    left: modules that are still to train, this one included; they share the time that is left.
    """
    model, path, start = job.model, module.site.path, time.monotonic()
    trained = trained_elements(model, plan, job.graph, module.site)
    names = {name: f"{path}.{name}" for name in trained.elements}
    dense = {name: plan.updates.get(full, tensor(model, full)).detach().cpu() for name, full in names.items()}
    inner = model.get_submodule(path)
    with job.cut.on_device(block), in_fp32(inner), frozen(inner):
        targets = {number: output(inner, call).cpu() for number, call in module.calls.items()}
    by = math.inf if job.deadline is None else start + max(job.deadline - start, 0.0) / left
    with _student(job, plan, block, module, trained) as student:
        lesson = Lesson(*_split(job, len(module.paths)), module.calls, targets)
        fitted = fit(student, lesson, job.steps, job.seed, late=lambda: time.monotonic() > by)
    module.calls.clear()
    if fitted.values:
        new = {names[name]: value for name, value in student.updates(dense, fitted.values).items()}
        groups = {
            name: student.projection(fitted.values) or reduction if reduction is trained.projection else reduction
            for name, reduction in plan.groups.items()
        }
        plan = replace(plan, groups=groups, updates={**plan.updates, **new})
    seconds = round(time.monotonic() - start, 3)
    return plan, Layer(fitted.errors, fitted.step, fitted.steps, fitted.stopped, seconds)


@contextmanager
def _student(job: _Job, plan: Plan, block: str, module: _Module, trained: Trained) -> Iterator[Student]:
    """Context manager for a module behind the mask of its plan, ready to train.

    A projected state runs in its small size, so that encode and decode can be trained.
    """
    model, path, projection = job.model, module.site.path, trained.projection
    inner, held = model.get_submodule(path), basis_of(model, path)
    dtype = next(inner.parameters()).dtype
    part = part_of(plan, job.graph, block)
    part = replace(part, groups={name: r for name, r in part.groups.items() if r is not projection})
    with masked(model, part, job.graph):
        if projection is not None:
            install(model, path, sliced(held, projection))
        try:
            wanted, example = trained.wanted, next(iter(module.calls.values()))
            with job.cut.on_device(block), in_fp32(inner), frozen(inner), quick_scans(inner, wanted):
                yield Student(inner, trained, held, dtype, example, wanted.once)
        finally:
            if projection is not None:
                install(model, path, held)


def _split(job: _Job, calls: int) -> tuple[list[int], dict[str, list[int]]]:
    """Return the numbers of windows that train, and those held out by kind of text, of all calls of a module."""
    offsets = [job.windows * call for call in range(calls)]
    held_out = {kind: [first + n for first in offsets for n in numbers] for kind, numbers in job.held_out.items()}
    apart = {number for numbers in held_out.values() for number in numbers}
    return [n for n in range(job.windows * calls) if n not in apart], held_out
