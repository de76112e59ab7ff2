"""Scorer contract: observe one layer, then return one importance per unit."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from sspruner.axes import GRANULARITIES
from sspruner.calibrate.shards import Total
from sspruner.calibrate.view import SSMView
from sspruner.errors import InputError, ModelError, PluginError, ProcessError, SSPrunerError
from sspruner.graph.group import DependencyGroup
from sspruner.plans.reduction import Basis

Choose = Callable[[torch.Tensor], torch.Tensor]  # scores (groups, units) -> units to keep: bool, the same shape

SELECT = "select"  # the model's own basis: units are its coordinates
NEEDS = ("weights", "activations", "gradients", "fisher", "loss")


class Scorer(ABC):
    """Base class: observes one dependency group of a model and returns one importance per unit. Higher = keep.

    The engine creates one instance for each layer and axis, so an instance may accumulate in its attributes.

    name    name for --scorer
    axes    axes that it can score
    needs   "weights": observe is called once per layer, and the view has weights only;
            "activations": observe is called once per layer and calibration batch;
            "gradients": observe is called once per layer, after a backward pass over all calibration batches;
            "fisher": like "gradients", with the mean of the squared gradients of single sequences in addition;
            "loss": observe is called once, with a view that returns the loss without some blocks or mixers.
            An instance may set its own value, depending on its options
    basis   "select": units are those of the model, on the axis `state` its coordinates. Any other name: units are
            directions of the state, which coordinates() returns; then axes is {"state"}
    comparable  True if importance can be compared between layers without scaling, such as a loss or a share. If not,
            the allocation "global" divides it by the root of the layer's sum of squares (sspruner.budgets.comparable)
    spectrum    description of importance if it is a spectrum, such as "Hankel singular values": reports plot it
    zero        description of the units whose importance is exactly 0, such as "experts that no calibration token
            reached": reports count them
    token_sums  names of the attributes that are sums over tokens, to be summed over processes that observe a part of
            the calibration each. An instance may set its own value, depending on its options
    granularity   on the axes of single elements: whether they compete within a "row", a "tensor", or "global"
    """

    name: ClassVar[str]
    axes: ClassVar[set[str]]
    needs: str = "activations"
    token_sums: tuple[str, ...] = ()
    basis: ClassVar[str] = "select"
    granularity: ClassVar[str] = "tensor"
    comparable: ClassVar[bool] = False
    spectrum: ClassVar[str] = ""
    zero: ClassVar[str] = ""

    axis: str = ""  # set by the engine: the axis being scored
    seed: int = 0  # set by the engine: the run's seed

    @abstractmethod
    def observe(self, view: SSMView) -> None:
        """Accumulate statistics from one layer and batch. Must not change the model."""

    def combine(self, total: Total) -> None:
        """Combine the observations of all processes; called before importance(), for scorers with needs="activations".

        total(value) returns the sum over all processes of a tensor, a number, or a dict of them; all processes must
        call it for the same values in the same order. A process that observed nothing has the values of its
        constructor. The default sums the attributes in token_sums; override it for statistics that are not plain sums.
        """
        for name in self.token_sums:
            setattr(self, name, total(getattr(self, name)))

    @abstractmethod
    def importance(self) -> torch.Tensor:
        """Return one importance per unit: float (groups, units), finite, higher = keep."""

    def coordinates(self) -> Basis:
        """Return encode (groups, units, N) and decode (groups, N, units) with encode @ decode = I.

        Only for a scorer with a basis.

        The coordinate along direction i is row i of encode times the state, and column i of decode reads it out. Called
        after importance().
        """
        raise PluginError(f"scorer {self.name!r} has no basis of its own")

    def reduce(self, choose: Choose) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Decide what to keep, and new values for other weights. Override it for a method that changes weights, too.

        choose(scores) applies the budget: float (groups, any units) -> bool, the same shape, True for units to keep.
        Returns the units to keep, bool (groups, units), and new values of whole tensors in their original sizes, by
        their key in `view.weights` without its rows: {"out_proj.bias": (hidden size,)}.
        """
        return choose(self.importance()), {}


def check_scorer_class(cls: Any, plugin: str) -> None:
    """Raise PluginError unless `cls` is a valid Scorer subclass, with a name, axes and needs."""
    if not (isinstance(cls, type) and issubclass(cls, Scorer)):
        raise PluginError(f"plugin {plugin!r}: sspruner_scorers returned {cls!r}, not a subclass of sspruner.Scorer")
    missing = [a for a in ("name", "axes") if not hasattr(cls, a)] + sorted(cls.__abstractmethods__)
    if missing:
        raise PluginError(f"plugin {plugin!r}: scorer {cls.__name__} does not define {', '.join(missing)}")
    if not isinstance(cls.name, str) or not isinstance(cls.axes, set | frozenset):
        raise PluginError(
            f"plugin {plugin!r}: scorer {cls.__name__} needs a name (a string) and axes (a set of strings)"
        )
    if cls.needs not in NEEDS:
        raise PluginError(f"plugin {plugin!r}: scorer {cls.name!r} has needs={cls.needs!r}; known: {', '.join(NEEDS)}")
    if not isinstance(cls.token_sums, tuple):
        raise PluginError(
            f"plugin {plugin!r}: scorer {cls.name!r} has token_sums={cls.token_sums!r}, not a tuple of names"
        )
    if cls.basis != SELECT and cls.axes != {"state"}:
        raise PluginError(f"plugin {plugin!r}: scorer {cls.name!r} has a basis of its own: its only axis is 'state'")
    if (cls.basis != SELECT) != (cls.coordinates is not Scorer.coordinates):
        raise PluginError(f"plugin {plugin!r}: scorer {cls.name!r}: basis={cls.basis!r} and coordinates() go together")
    if cls.granularity not in GRANULARITIES:
        raise PluginError(
            f"plugin {plugin!r}: scorer {cls.name!r} has granularity={cls.granularity!r}; known: "
            f"{', '.join(GRANULARITIES)}"
        )


def make_scorer(cls: type[Scorer], *, axis: str, seed: int, options: dict[str, Any]) -> Scorer:
    """Create an instance for one dependency group. Raises InputError for an option that it does not take."""
    accepted = [p for p in inspect.signature(cls).parameters.values() if p.kind is not p.VAR_POSITIONAL]
    unknown = set(options) - {p.name for p in accepted}
    if unknown:
        names = ", ".join(p.name for p in accepted) or "none"
        raise InputError(f"scorer {cls.name!r}: unknown option {sorted(unknown)[0]!r}; it takes {names}")
    missing = [
        p.name for p in accepted if p.default is p.empty and p.kind is not p.VAR_KEYWORD and p.name not in options
    ]
    if missing:
        raise InputError(f"scorer {cls.name!r}: option {missing[0]!r} is required; give --option {missing[0]}=VALUE")
    try:
        instance = cls(**options)
    except SSPrunerError:
        raise
    except Exception as error:
        raise PluginError(f"scorer {cls.name!r} could not be made: {type(error).__name__}: {error}") from error
    instance.axis, instance.seed = axis, seed
    return instance


def check_combines(scorer: Scorer) -> None:
    """Raise InputError for a scorer that cannot combine the observations of several processes."""
    if scorer.needs == "activations" and not scorer.token_sums and type(scorer).combine is Scorer.combine:
        raise InputError(
            f"scorer {scorer.name!r} runs in one process: it does not say how observations of several add up; name its "
            "sums over tokens in token_sums, or define combine()"
        )


def combine(scorer: Scorer, group: DependencyGroup, plugin: str, total: Total) -> None:
    """Call scorer.combine(total). Any exception becomes a PluginError that names the plugin and the layer."""
    with _blaming(_where(scorer, group, plugin)):
        scorer.combine(total)


def observe(scorer: Scorer, view: SSMView, plugin: str) -> None:
    """Call scorer.observe(view). Any exception becomes a PluginError that names the plugin and the layer."""
    with _blaming(_where(scorer, view.group, plugin)):
        scorer.observe(view)


def checked_importance(scorer: Scorer, group: DependencyGroup, plugin: str) -> torch.Tensor:
    """Return the scorer's importance as fp32 (groups, units) on the CPU. Raises PluginError if it is invalid."""
    where = _where(scorer, group, plugin)
    with _blaming(where):
        importance = scorer.importance()
    expected = (group.groups, group.units)
    if not isinstance(importance, torch.Tensor) or tuple(importance.shape) != expected:
        got = tuple(importance.shape) if isinstance(importance, torch.Tensor) else type(importance).__name__
        raise PluginError(f"{where} returned {got}, expected a tensor of shape (groups, units) = {expected}")
    importance = importance.detach().to("cpu", torch.float32)
    bad = int((~importance.isfinite()).sum())
    if bad:
        raise PluginError(f"{where} returned {bad} of {importance.numel()} values that are NaN or infinite")
    return importance


def checked_coordinates(scorer: Scorer, group: DependencyGroup, plugin: str) -> Basis:
    """Return scorer.coordinates() as fp32 on the CPU. Raises PluginError if they are invalid."""
    where = _where(scorer, group, plugin)
    with _blaming(where):
        encode, decode = (part.detach().to("cpu", torch.float32) for part in scorer.coordinates())
    shape = (group.groups, group.units, group.units)
    if encode.shape != shape or decode.shape != shape:
        raise PluginError(f"{where}: coordinates of {tuple(encode.shape)} and {tuple(decode.shape)}, not {shape} twice")
    if not (encode.isfinite().all() and decode.isfinite().all()):
        raise PluginError(f"{where}: coordinates that are NaN or infinite")
    return encode, decode


def reduced(
    scorer: Scorer, group: DependencyGroup, plugin: str, importance: torch.Tensor, choose: Choose
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Call scorer.reduce(choose) and check it: units to keep, bool (groups, units), and finite updates by full names.

    importance: the scorer's importance. Raises PluginError if the scorer breaks its contract.
    """
    where = _where(scorer, group, plugin)
    with _blaming(where):
        keep, updates = scorer.reduce(choose)
    if not isinstance(keep, torch.Tensor) or keep.dtype != torch.bool or keep.shape != importance.shape:
        raise PluginError(f"{where}: reduce returned no bool tensor of shape {tuple(importance.shape)}")
    counts, expected_counts = keep.sum(-1).cpu(), choose(importance).sum(-1).cpu()
    if not group.tensor and not torch.equal(counts, expected_counts):
        raise PluginError(f"{where}: reduce keeps {counts.tolist()} units in its sets, not {expected_counts.tolist()}")
    if not isinstance(updates, dict) or not all(isinstance(key, str) for key in updates):
        raise PluginError(f"{where}: reduce returned new values as {type(updates).__name__}, not by name in a dict")
    for key, value in updates.items():
        if not isinstance(value, torch.Tensor) or not value.isfinite().all():
            raise PluginError(f"{where}: the update of {key} is not a finite tensor")
    prefix = group.tensor.rpartition(".")[0] or group.layer
    return keep.cpu(), {f"{prefix}.{key}": value.detach().cpu() for key, value in updates.items()}


def _where(scorer: Scorer, group: DependencyGroup, plugin: str) -> str:
    return f"plugin {plugin!r}: scorer {scorer.name!r} on {group.name}"


@contextmanager
def _blaming(where: str) -> Iterator[None]:
    """Context manager that turns errors of a plugin's code, of any type, into one PluginError that names the place."""
    try:
        yield
    except InputError as error:  # the user's request cannot be met; the scorer's message gives the reason
        raise InputError(f"{where.partition(': ')[2]}: {error}") from error
    except (ModelError, ProcessError):  # faults of the model or of other processes, not of the plugin
        raise
    except Exception as error:
        detail = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
        raise PluginError(f"{where} failed: {detail}") from error
