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
from sspruner.graph.tree import tree


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
        """Return the graph as a rich tree: a branch for the layers that are alike, with the size of one unit."""
        return tree(self)

    def __str__(self) -> str:
        console = Console(file=StringIO(), width=120, color_system=None)
        console.print(self.tree(), markup=False, highlight=False, soft_wrap=True)
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return text.rstrip("\n")
