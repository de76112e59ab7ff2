"""SSMGraph: the dependency groups of one model, as data that prints as a tree. `trace` makes it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from io import StringIO
from typing import Any

from rich.console import Console
from rich.tree import Tree
from torch import nn

from sspruner.errors import InputError, ModelError
from sspruner.graph.family import Family
from sspruner.graph.group import DependencyGroup
from sspruner.graph.layout import dependency_group, state_bytes
from sspruner.plugins import manager


@dataclass(frozen=True)
class Layer:
    """One mixer: where it is, which family reads it, what it weighs."""

    path: str
    family: Family
    parameters: int
    state_bytes: int
    groups: tuple[DependencyGroup, ...]


@dataclass(frozen=True)
class SSMGraph:
    """What can be removed from a model. `groups` maps `<module path>:<axis>` to its dependency group."""

    model_class: str
    parameters: int
    weight_bytes: int
    layers: tuple[Layer, ...]

    @property
    def groups(self) -> dict[str, DependencyGroup]:
        """All dependency groups by name, in layer order."""
        return {g.name: g for layer in self.layers for g in layer.groups}

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that at least one layer has."""
        return tuple(dict.fromkeys(g.axis for g in self.groups.values()))

    @property
    def state_bytes(self) -> int:
        """Bytes of recurrent state per sequence at decode (fp32), all layers."""
        return sum(layer.state_bytes for layer in self.layers)

    def on_axis(self, axis: str) -> dict[str, DependencyGroup]:
        """The dependency groups of one axis. Raises InputError if the model has no such axis."""
        found = {name: g for name, g in self.groups.items() if g.axis == axis}
        if not found:
            raise InputError(f"axis {axis!r}: {self.model_class} has none; it has {', '.join(self.axes)}")
        return found

    def to_json(self) -> dict[str, Any]:
        """The graph's numbers, for programs."""
        return {
            "model_class": self.model_class,
            "parameters": self.parameters,
            "weight_bytes": self.weight_bytes,
            "state_bytes": self.state_bytes,
            "layers": [
                {
                    "path": layer.path,
                    "family": layer.family.name,
                    "parameters": layer.parameters,
                    "state_bytes": layer.state_bytes,
                    "axes": {
                        g.axis: {
                            "groups": g.groups,
                            "units": g.units,
                            "parameters_per_unit": g.parameters_per_unit,
                            "state_bytes_per_unit": g.state_bytes_per_unit,
                        }
                        for g in layer.groups
                    },
                }
                for layer in self.layers
            ],
        }

    def tree(self) -> Tree:
        """The graph as a rich tree: a line per layer, a line per axis, and what one unit owns."""
        root = Tree(
            f"{self.model_class}: {self.parameters:,} parameters, {self.weight_bytes:,} bytes of weights, "
            f"{self.state_bytes:,} bytes of state per sequence"
        )
        shown: set[tuple[str, ...]] = set()
        for layer in self.layers:
            branch = root.add(
                f"{layer.path} ({layer.family.name}): {layer.parameters:,} parameters, "
                f"{layer.state_bytes:,} bytes of state"
            )
            for group in layer.groups:
                sets = f"{group.groups} groups x {group.units}" if group.groups > 1 else f"{group.units}"
                leaf = branch.add(
                    f"{group.axis}: {sets} units, {group.parameters_per_unit:,} parameters and "
                    f"{group.state_bytes_per_unit:,} bytes of state each"
                    + (", same count in every group" if group.groups > 1 else "")
                )
                members = _members_by_tensor(group)
                if members not in shown:  # the same in every layer of a family: said once
                    shown.add(members)
                    for line in members:
                        leaf.add(line)
        return root

    def __str__(self) -> str:
        console = Console(file=StringIO(), width=120, color_system=None)
        console.print(self.tree(), markup=False, highlight=False, soft_wrap=True)
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return text.rstrip("\n")


def _members_by_tensor(group: DependencyGroup) -> tuple[str, ...]:
    """`in_proj.weight dim 0: B, C`: one line per tensor, relative to the layer."""
    lines: dict[str, list[str]] = {}
    for m in group.members:
        fold = ", folded" if m.fold else ""
        key = f"{m.parameter.removeprefix(group.layer + '.')} dim {m.dim}{fold}"
        lines.setdefault(key, []).append(m.rows)
    return tuple(f"{key}: rows of {', '.join(rows)}" for key, rows in lines.items())


def trace(model: nn.Module) -> SSMGraph:
    """Describe what can be removed from `model`, layer by layer. The model is not changed and may be on meta.

    Raises ModelError if the model has no layer of a known family.
    """
    families = {family.mixer_class: family for family in manager.families().values()}
    layers = []
    for path, module in model.named_modules():
        family = families.get(type(module).__name__)
        if family is None:
            continue
        layout = family.layout(module)
        layers.append(
            Layer(
                path=path,
                family=family,
                parameters=sum(p.numel() for p in module.parameters()),
                state_bytes=state_bytes(layout),
                groups=tuple(dependency_group(layout, module, path, axis) for axis in layout.axes),
            )
        )
    if not layers:
        common = Counter(type(m).__name__ for m in model.modules() if not isinstance(m, nn.ModuleList))
        found = ", ".join(f"{n} {name}" for name, n in common.most_common(4))
        raise ModelError(
            f"{type(model).__name__}: no state-space layer found (it has {found}); "
            f"known mixers: {', '.join(sorted(families))}"
        )
    return SSMGraph(
        model_class=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        layers=tuple(layers),
    )
