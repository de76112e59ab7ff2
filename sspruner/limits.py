"""Limits: a budget in users' units, and the sizes that a plan leads to, predicted without a cut."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from sspruner.errors import InputError
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.planning.plan import Plan
from sspruner.planning.reduction import projections
from sspruner.surgery.predict import added_parameters, dropped_modules, removed_parameters, removed_state_bytes
from sspruner.surgery.project import added_by_projections
from sspruner.surgery.slice import rows_to_drop

FP32 = 4  # bytes
UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


@dataclass(frozen=True)
class Limits:
    """What a cut model may take and lose. What is None does not matter.

    state_bytes          of recurrent state per sequence, at most
    max_batch, memory    so many sequences beside the weights fit in so many bytes: recurrent and convolution states.
                         The key/value caches of hybrids grow with the text and are not counted
    parameters           at most: a count, or below or at 1 a fraction of the model's own
    perplexity_increase  at most, over the dense model's: 0.01 is 1 %. On calibration text
    kl                   to the dense model, at most, in nats per token. On calibration text
    """

    state_bytes: float | None = None
    max_batch: int | None = None
    memory: float | None = None
    parameters: float | None = None
    perplexity_increase: float | None = None
    kl: float | None = None

    def __post_init__(self) -> None:
        """Raise InputError for limits that make no sense."""
        if (self.max_batch is None) != (self.memory is None):
            raise InputError("max-batch and memory go together: how many sequences, in how many bytes")
        for name, value in asdict(self).items():
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise InputError(f"{name.replace('_', '-')} {value}: must be a number above 0")

    @property
    def of_size(self) -> bool:
        """Whether the size of the cut model is limited."""
        return any(limit is not None for limit in (self.state_bytes, self.memory, self.parameters))

    @property
    def of_damage(self) -> bool:
        """Whether what the cut costs is limited."""
        return self.perplexity_increase is not None or self.kl is not None

    def to_json(self) -> dict[str, float]:
        """What was asked for."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Sizes:
    """Of a model: parameters; bytes of weights; bytes of recurrent and of convolution state per sequence."""

    parameters: int
    weight_bytes: int
    state_bytes: int
    conv_bytes: int

    def exceeds(self, limits: Limits, dense: Sizes) -> str:
        """The first limit of size that is exceeded, and by what, "" if none is. dense: the uncut model's."""
        if limits.state_bytes is not None and self.state_bytes > limits.state_bytes:
            return f"state-bytes {limits.state_bytes:,.0f}: {self.state_bytes:,} B of state per sequence"
        if limits.memory is not None and limits.max_batch is not None:
            taken = self.weight_bytes + limits.max_batch * (self.state_bytes + self.conv_bytes)
            if taken > limits.memory:
                return f"memory {limits.memory:,.0f}: {limits.max_batch} sequences take {taken:,} B with the weights"
        if limits.parameters is not None:
            most = limits.parameters * (dense.parameters if limits.parameters <= 1 else 1)
            if self.parameters > most:
                return f"params {most:,.0f}: {self.parameters:,} parameters"
        return ""


def sizes(model: nn.Module, graph: SSMGraph, plan: Plan | None = None) -> Sizes:
    """The sizes of a model, or of what a plan makes of it: predicted, nothing is cut.

    Bytes of weights are exact where all weights have one dtype; the bases of projected states are fp32.
    """
    itemsize = next(model.parameters()).element_size()
    conv = _conv_values(model, graph, plan) * itemsize
    if plan is None:
        return Sizes(graph.parameters, graph.weight_bytes, graph.state_bytes, conv)
    biases = added_parameters(model, plan, graph) - added_by_projections(model, plan, graph)
    removed, bases = removed_parameters(model, plan, graph), _bases_left(model, graph, plan)
    return Sizes(
        graph.parameters - removed + biases + bases,
        graph.weight_bytes - (removed - biases) * itemsize + bases * FP32,
        graph.state_bytes - removed_state_bytes(plan, graph),
        conv,
    )


def _conv_values(model: nn.Module, graph: SSMGraph, plan: Plan | None) -> int:
    """Numbers in the convolution states of one sequence; a mixer without a convolution has none."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    rows, gone = (rows_to_drop(plan, graph), dropped_modules(plan, graph)) if plan else ({}, [])
    total = 0
    for site in graph.layers:
        name = f"{site.path}.conv1d.weight"
        if name in parameters and not _inside(site.path, gone):
            channels, _, kernel = parameters[name].shape
            total += (channels - len(rows.get(name, {}).get((0,), ()))) * kernel
    return total


def _bases_left(model: nn.Module, graph: SSMGraph, plan: Plan) -> int:
    """Parameters that projections add where their mixers stay, and of these in the B/C groups that stay."""
    gone, total = dropped_modules(plan, graph), 0
    for name, projection in projections(plan.groups).items():
        layer = graph.groups[name].layer
        if not _inside(layer, gone):
            added = added_by_projections(model, Plan({name: projection}), graph)
            sets = plan.groups.get(f"{layer}:group")
            total += added * sets.after // sets.before if sets else added  # whole: each group has as many
    return total


def _inside(path: str, modules: Sequence[str]) -> bool:
    return any(f"{path}.".startswith(f"{module}.") for module in modules)


def parse_bytes(text: str, option: str) -> float:
    """`25MB`, `25MiB`, `80 GB`, `1000`: bytes. Raises InputError for anything else."""
    return _number(text, option, r"B?", "a size such as 25MB, 25MiB or 80GB")


def parse_bandwidth(text: str, option: str) -> float:
    """`3.35TB/s`, `900 GB/s`: bytes per second. Raises InputError for anything else."""
    return _number(text, option, r"B/s", "a rate such as 3.35TB/s or 900GB/s")


def parse_flops(text: str, option: str) -> float:
    """`989TFLOP/s`, `80 GFLOPS`: operations per second. Raises InputError for anything else."""
    return _number(text, option, r"FLOP(?:/s|S)", "a rate such as 989TFLOP/s")


def parse_parameters(text: str, option: str) -> float:
    """`0.8x`: a fraction; `900M`, `1.1B`, `1100000000`: a count."""
    if text.strip().endswith("x"):
        fraction = _number(text.strip()[:-1], option, r"", "a fraction such as 0.8x")
        if fraction > 1:
            raise InputError(f"{option} {text!r}: more than the model has; give a fraction up to 1x, or a count")
        return fraction
    text = re.sub(r"[Bb]\s*$", "G", text)  # billions
    count = _number(text, option, r"", "a fraction such as 0.8x, or a count such as 900M or 1.1B")
    if count <= 1:
        raise InputError(f"{option} {text!r}: is a count; a fraction has an x, {count:g}x")
    return count


def parse_increase(text: str, option: str) -> float:
    """`1%` or `0.01`."""
    if text.strip().endswith("%"):
        return _number(text.strip()[:-1], option, r"", "a percentage such as 1%") / 100
    return _number(text, option, r"", "a percentage such as 1%, or a fraction such as 0.01")


def _number(text: str, option: str, suffix: str, expected: str) -> float:
    match = re.fullmatch(
        rf"\s*(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*([kMGT]i?)?\s*{suffix}\s*", text.replace("K", "k"), re.A
    )
    if match is None:
        raise InputError(f"{option} {text!r}: expected {expected}")
    value = float(match[1] + (match[2] or "")) * UNITS[match[3] or ""]
    if not (value > 0 and math.isfinite(value)):
        raise InputError(f"{option} {text!r}: must be above 0")
    return value


def limits_from(**texts: Any) -> Limits | None:
    """Limits from the command line's texts, by option with underscores; None where none is given."""
    read = {
        "state_bytes": parse_bytes,
        "memory": parse_bytes,
        "params": parse_parameters,
        "max_ppl_increase": parse_increase,
    }
    names = {"params": "parameters", "max_ppl_increase": "perplexity_increase", "max_kl": "kl"}
    values: dict[str, Any] = {
        names.get(option, option): read[option](value, f"--{option.replace('_', '-')}") if option in read else value
        for option, value in texts.items()
        if value is not None
    }
    return Limits(**values) if values else None
