"""SSMGraph: the dependency groups of one model, as data that prints as a tree. Created by `trace`."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from io import StringIO
from typing import Any

from rich.console import Console
from rich.tree import Tree

from sspruner.axes import WHOLE_MODEL
from sspruner.errors import InputError
from sspruner.graph.family import Family
from sspruner.graph.group import DependencyGroup
from sspruner.graph.site import Site


@dataclass(frozen=True)
class SSMGraph:
    """Prunable structure of a model. `groups` maps `<module path>:<axis>` to its dependency group.

    sites      every described module, in the model's order; `layers` are the mixers among them
    blocks     path of the list of repeated blocks, "" if there is none
    family     family of the whole model; None if unknown, then only its mixers are described
    elements   dependency groups of the axes of single elements, `weight` and `decay`
    """

    model_class: str
    parameters: int
    weight_bytes: int
    sites: tuple[Site, ...]
    groups: dict[str, DependencyGroup]
    blocks: str = ""
    family: Family | None = None
    elements: dict[str, DependencyGroup] = field(default_factory=dict)

    @cached_property
    def layers(self) -> tuple[Site, ...]:
        """The mixers, in layer order."""
        return tuple(site for site in self.sites if site.family is not None)

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that at least one layer has."""
        return tuple(dict.fromkeys(g.axis for g in self.groups.values()))

    @property
    def state_bytes(self) -> int:
        """Bytes of recurrent state per sequence during decoding (fp32), over all layers."""
        return sum(site.state_bytes for site in self.layers)

    def groups_of(self, site: Site) -> list[DependencyGroup]:
        """Return the dependency groups of one module."""
        return [self.groups[f"{site.path}:{axis}"] for axis in site.layout.axes]

    def on_axis(self, axis: str) -> dict[str, DependencyGroup]:
        """Return the dependency groups of one axis. Raises InputError if the model has no such axis."""
        groups = {name: g for name, g in {**self.groups, **self.elements}.items() if g.axis == axis}
        if not groups:
            if axis in WHOLE_MODEL and self.family and self.family.stream_refused:
                raise InputError(f"axis {axis!r}: {self.model_class} cannot be cut there: {self.family.stream_refused}")
            available = dict.fromkeys([*self.axes, *(g.axis for g in self.elements.values())])
            raise InputError(f"axis {axis!r}: {self.model_class} has none; it has {', '.join(available)}")
        return groups

    def to_json(self) -> dict[str, Any]:
        """Return the sizes in the graph as a JSON object."""
        return {
            "model_class": self.model_class,
            "parameters": self.parameters,
            "weight_bytes": self.weight_bytes,
            "state_bytes": self.state_bytes,
            "layers": [
                {
                    "path": layer.path,
                    "kind": layer.kind,
                    "parameters": layer.parameters,
                    "state_bytes": layer.state_bytes,
                    "aliases": list(layer.aliases),
                    "axes": {
                        g.axis: {
                            "groups": g.groups,
                            "units": g.units,
                            "parameters_per_unit": g.parameters_per_unit,
                            "state_bytes_per_unit": g.state_bytes_per_unit,
                        }
                        for g in self.groups_of(layer)
                    },
                }
                for layer in self.sites
                if layer.family or layer.layout.axes
            ],
            "model": {
                g.name: {"groups": g.groups, "units": g.units, "parameters_per_unit": g.parameters_per_unit}
                for g in self.groups.values()
                if g.axis in WHOLE_MODEL
            },
        }

    def tree(self) -> Tree:
        """Return the graph as a rich tree: one line per layer and axis, with the size of one unit."""
        root = Tree(
            f"{self.model_class}: {self.parameters:,} parameters, {self.weight_bytes:,} bytes of weights, "
            f"{self.state_bytes:,} bytes of state per sequence"
        )
        shown: set[tuple[str, ...]] = set()
        for site in self.sites:
            groups = self.groups_of(site)
            if not groups:
                continue
            state = f", {site.state_bytes:,} bytes of state" if site.family else ""
            shared = f", shared by {1 + len(site.aliases)} layers" if site.aliases else ""
            branch = root.add(f"{site.path} ({site.kind}): {site.parameters:,} parameters{state}{shared}")
            for group in groups:
                sets = f"{group.groups} groups x {group.units}" if group.groups > 1 else f"{group.units}"
                each = f" and {group.state_bytes_per_unit:,} bytes of state" if group.state_bytes_per_unit else ""
                leaf = branch.add(
                    f"{group.axis}: {sets} units, {group.parameters_per_unit:,} parameters{each} each"
                    + (", same count in every group" if group.groups > 1 else "")
                )
                lines = _members_by_tensor(group, {f.target for f in site.layout.folds if group.axis in f.over})
                if lines not in shown:  # identical in every layer of a family: printed once
                    shown.add(lines)
                    for line in lines:
                        leaf.add(line)
        for group in self.groups.values():
            if group.axis in WHOLE_MODEL:
                each = "whole modules" if group.blocks else f"{group.parameters_per_unit:,} parameters each"
                root.add(f"{group.name}: {group.units} units, {each}")
        if any(member.tensor.endswith("in_proj.bias") for group in self.groups.values() for member in group.members):
            root.add("biases of in_proj: padding on the left enters the state, cut or not (docs/saving.md)")
        return root

    def __str__(self) -> str:
        console = Console(file=StringIO(), width=120, color_system=None)
        console.print(self.tree(), markup=False, highlight=False, soft_wrap=True)
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return text.rstrip("\n")


def _members_by_tensor(group: DependencyGroup, folded: set[str]) -> tuple[str, ...]:
    """Return one line per tensor, such as `in_proj.weight dim 0: rows of B, C`, and the tensors that a cut rescales."""
    lines: dict[str, list[str]] = {}
    for m in group.members:
        key = f"{m.tensor.removeprefix(group.layer + '.')} dim {', '.join(map(str, m.dims))}"
        lines.setdefault(key, []).append(m.rows)
    cut = [f"{key}: rows of {', '.join(rows)}" for key, rows in lines.items()]
    if group.gain:
        tensor, matrix = group.key(group.gain.tensor), group.key(group.gain.into)
        cut.append(f"{tensor} dim 0: one for all groups, moved into {matrix} where these keep other units")
    return (*cut, f"scaled, so that sliced = masked: {', '.join(sorted(folded))}") if folded else tuple(cut)
