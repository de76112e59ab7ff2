"""Observers for conformance checks: the scorer's raw results, the model's bits, and reduce's updates."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier, BrokenBarrierError
from typing import Any

import torch
from torch import nn

from sspruner.calibrate.view import SSMView
from sspruner.errors import PluginError
from sspruner.graph.group import DependencyGroup
from sspruner.plans.reduction import Basis
from sspruner.scoring.scorer import SELECT, Scorer


class Watch:
    """Wrapper of a scorer class that records what it returns and what it writes to.

    cls         class to score with, the same for all runs, so that class state persists between them
    problem     first fault of the present run, as a phrase
    instances   dependency group -> the instance that scored it
    """

    def __init__(self, scorer: type[Scorer]) -> None:
        self.start()
        self.observing = False
        watch = self

        def observe(self: Any, view: SSMView) -> None:
            name = watch.names[id(self)] = view.group.name
            watch.shapes[name] = (view.group.groups, view.group.units)
            watch.instances[name] = self
            shown = _activations(view)
            before = {key: value.clone() for key, value in shown.items()}
            scorer.observe(self, view)
            changed = [key for key, value in shown.items() if not torch.equal(value, before[key])]
            if changed and not watch.problem:
                watch.problem = f"writes to view.{changed[0]}, which is shared, in {view.layer}"

        def importance(self: Any) -> Any:
            if watch.observing:
                return torch.zeros(watch.shapes[watch.names[id(self)]])
            value = scorer.importance(self)
            name = watch.names.get(id(self))
            if name and not watch.problem:
                watch.problem = _fault(value, watch.shapes[name], name)
            return value

        def coordinates(self: Any) -> Basis:
            if watch.observing:
                groups, units = watch.shapes[watch.names[id(self)]]
                return (torch.eye(units).expand(groups, -1, -1),) * 2
            return scorer.coordinates(self)

        members = {"observe": observe, "importance": importance, "__module__": scorer.__module__}
        if scorer.basis != SELECT:
            members["coordinates"] = coordinates
        self.cls: type[Scorer] = type(scorer.__name__, (scorer,), members)

    @contextmanager
    def only_observing(self) -> Iterator[None]:
        """Context manager in which instances observe but `importance` is not called, which may be allowed only once."""
        self.observing = True
        try:
            yield
        finally:
            self.observing = False

    def start(self) -> None:
        """Reset the records before a run."""
        self.problem = ""
        self.instances: dict[str, Scorer] = {}
        self.names: dict[int, str] = {}
        self.shapes: dict[str, tuple[int, int]] = {}


def combine_all(instances: Sequence[Scorer]) -> None:
    """Call `combine` on all instances concurrently, like several processes. Raises the first error."""
    meet, values = Barrier(len(instances), timeout=20), [None] * len(instances)

    def one(number: int) -> None:
        def total(value: Any) -> Any:
            values[number] = value
            meet.wait()
            result = _sum(values)
            meet.wait()  # all must read this value before the next one is written
            return result

        try:
            instances[number].combine(total)
        except BaseException:
            meet.abort()
            raise

    with ThreadPoolExecutor(len(instances)) as threads:
        calls = [threads.submit(one, number) for number in range(len(instances))]
    errors = [error for call in calls if (error := call.exception())]
    for error in [*(e for e in errors if not isinstance(e, BrokenBarrierError)), *errors][:1]:
        raise error


def _sum(values: Sequence[Any]) -> Any:
    """Sum tensors, numbers, or dicts that may lack keys, like `sspruner.calibrate.shards.summed`."""
    if isinstance(values[0], dict):
        return {
            key: _sum([value.get(key, 0) for value in values]) for key in dict.fromkeys(k for v in values for k in v)
        }
    return sum(values)


def _activations(view: SSMView) -> dict[str, torch.Tensor]:
    """Return the model's own tensors that the view exposes."""
    shown = {"mask": view.mask}
    for key in ("hidden", "output"):
        try:
            shown[key] = getattr(view, key)
        except PluginError:
            continue
    return shown


def _fault(value: Any, shape: tuple[int, int], name: str) -> str:
    """Describe what is wrong with an importance, "" if nothing is."""
    if not isinstance(value, torch.Tensor):
        return f"importance returns {type(value).__name__}, not a tensor, in {name}"
    if tuple(value.shape) != shape:
        return f"importance has shape {tuple(value.shape)}, not (groups, units) = {shape}, in {name}"
    if not value.is_floating_point():
        return f"importance is {value.dtype}, not a floating type, in {name}"
    bad = int((~value.isfinite()).sum())
    return f"importance has {bad} of {value.numel()} values that are NaN or infinite, in {name}" if bad else ""


class Touched:
    """Snapshot of a model (bits, gradients, flags, hooks) and of torch's global state."""

    def __init__(self, model: nn.Module) -> None:
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self.tensors = {n: (t, t.detach().clone(), t.requires_grad, t.grad) for n, t in named}
        self.modules = {n: _flags(m) for n, m in model.named_modules(remove_duplicate=False)}
        self.world = _world()

    def change(self, model: nn.Module) -> str:
        """Describe the first difference from the snapshot, "" if there is none."""
        now = Touched(model)
        if now.tensors.keys() != self.tensors.keys():
            return f"it gains or loses {min(now.tensors.keys() ^ self.tensors.keys())}"
        for name, (was, bits, requires_grad, grad) in self.tensors.items():
            tensor, new, now_requires_grad, has = now.tensors[name]
            if not torch.equal(_bits(bits), _bits(new)) or bits.dtype != new.dtype:
                return f"{name} has other values"
            if tensor is not was:
                return f"{name} is another tensor"
            if now_requires_grad != requires_grad:
                return f"{name} has requires_grad={now_requires_grad}, it had {requires_grad}"
            if has is not grad:
                return f"{name} has another gradient (.grad) than before"
        for name, flags in self.modules.items():
            if now.modules.get(name) != flags:
                return f"the training flag or the hooks of {name or 'the model'} differ"
        for name, value in self.world.items():
            if now.world[name] != value:
                return f"torch's {name} differs afterwards"
        return ""


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8) if tensor.numel() else tensor


def _flags(module: nn.Module) -> tuple[Any, ...]:
    return module.training, *(
        len(h) for h in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    )


def _world() -> dict[str, Any]:
    return {
        "global random state": (torch.random.get_rng_state().numpy().tobytes(), random.getstate()),
        "grad mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
    }


def chooser(group: DependencyGroup, pattern: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a `choose` function like the engine's: half of every set; or, of single elements, 2 of every 4 columns."""

    def choose(scores: torch.Tensor) -> torch.Tensor:
        width = scores.shape[-1]
        if group.tensor and pattern and width % 4 == 0:
            parts = scores.view(len(scores), -1, 4)  # (groups, runs, 4)
            return _best(parts, 2).flatten(-2)
        count = max(width // 2, 1)
        if width == group.units and not group.tensor:
            count = min(group.counts(), key=lambda n: (abs(n - count), n), default=width)
        return _best(scores, count)

    return choose


def _best(scores: torch.Tensor, count: int) -> torch.Tensor:
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :count], True)


def broken_update(model: nn.Module, group: DependencyGroup, key: str, value: Any) -> str:
    """Describe what is wrong with one of reduce's updates, "" if nothing is."""
    name = f"{group.tensor.rpartition('.')[0] or group.layer}.{key}"
    owner, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        return f"names {name}, which the model does not have"
    tensor = getattr(module, leaf, None)
    if isinstance(tensor, torch.Tensor):
        shape = tuple(tensor.shape)
    elif leaf == "bias" and isinstance(module, nn.Linear):  # the engine adds it
        shape = (module.out_features,)
    else:
        return f"names {name}, which the model does not have"
    if not isinstance(value, torch.Tensor) or tuple(value.shape) != shape:
        got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        return f"is {got}, not a tensor of shape {shape}"
    if not value.is_floating_point() or not value.isfinite().all():
        return "is not finite"
    return ""
