"""SSMGraph: the dependency groups of one model, as data that prints as a tree. `trace` makes it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from io import StringIO
from typing import Any

from rich.console import Console
from rich.tree import Tree
from torch import nn

from sspruner.errors import InputError, ModelError
from sspruner.graph.causality import check_causal
from sspruner.graph.elements import element_groups
from sspruner.graph.family import Family
from sspruner.graph.group import Block, DependencyGroup, Member
from sspruner.graph.layout import Layout, dependency_group, members, state_bytes
from sspruner.graph.parts import PARTS, output_head
from sspruner.plugins import manager

WHOLE_MODEL = ("hidden", "block", "mixer")  # axes with one dependency group for all layers


@dataclass(frozen=True)
class Site:
    """One module that the graph describes: where it is, what kind it is, how its rows lie.

    family    the family of a mixer; None for the parts around the mixers
    aliases   other paths that hold the same parameters (Zamba's shared blocks): cut once, corrected everywhere
    """

    path: str
    kind: str
    layout: Layout
    parameters: int
    family: Family | None = None
    aliases: tuple[str, ...] = ()

    @property
    def state_bytes(self) -> int:
        """Bytes of recurrent state that one sequence keeps here at decode."""
        return state_bytes(self.layout)


@dataclass(frozen=True)
class SSMGraph:
    """What can be removed from a model. `groups` maps `<module path>:<axis>` to its dependency group.

    sites      every module that is described, in the model's order; `layers` are the mixers among them
    blocks     path of the list of repeated blocks, "" if there is none
    family     the family of the whole model, None if it is not a known one: then only its mixers are described
    elements   the same as `groups` for the axes of single elements, `weight` and `decay`
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
        """Bytes of recurrent state per sequence at decode (fp32), all layers."""
        return sum(site.state_bytes for site in self.layers)

    def groups_of(self, site: Site) -> list[DependencyGroup]:
        """The dependency groups of one module."""
        return [self.groups[f"{site.path}:{axis}"] for axis in site.layout.axes]

    def on_axis(self, axis: str) -> dict[str, DependencyGroup]:
        """The dependency groups of one axis. Raises InputError if the model has no such axis."""
        found = {name: g for name, g in {**self.groups, **self.elements}.items() if g.axis == axis}
        if not found:
            have = dict.fromkeys([*self.axes, *(g.axis for g in self.elements.values())])
            raise InputError(f"axis {axis!r}: {self.model_class} has none; it has {', '.join(have)}")
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
        """The graph as a rich tree: a line per layer, a line per axis, and what one unit owns."""
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
                if lines not in shown:  # the same in every layer of a family: said once
                    shown.add(lines)
                    for line in lines:
                        leaf.add(line)
        for group in self.groups.values():
            if group.axis in WHOLE_MODEL:
                each = "whole modules" if group.blocks else f"{group.parameters_per_unit:,} parameters each"
                root.add(f"{group.name}: {group.units} units, {each}")
        return root

    def __str__(self) -> str:
        console = Console(file=StringIO(), width=120, color_system=None)
        console.print(self.tree(), markup=False, highlight=False, soft_wrap=True)
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return text.rstrip("\n")


def _members_by_tensor(group: DependencyGroup, folded: set[str]) -> tuple[str, ...]:
    """`in_proj.weight dim 0: B, C`: one line per tensor, relative to the layer; and what is scaled by a cut."""
    lines: dict[str, list[str]] = {}
    for m in group.members:
        key = f"{m.tensor.removeprefix(group.layer + '.')} dim {', '.join(map(str, m.dims))}"
        lines.setdefault(key, []).append(m.rows)
    cut = [f"{key}: rows of {', '.join(rows)}" for key, rows in lines.items()]
    return (*cut, f"scaled, so that sliced = masked: {', '.join(sorted(folded))}") if folded else tuple(cut)


def trace(model: nn.Module) -> SSMGraph:
    """Describe what can be removed from `model`, layer by layer. The model is not changed and may be on meta.

    Raises ModelError if the model has no layer of a known family or one without size, or if the installed code of a
    mixer is not causal.
    """
    families = manager.families()
    family = families.get(getattr(getattr(model, "config", None), "model_type", None) or "")
    sites = _sites(model, families, known=family is not None)
    mixers = [site for site in sites if site.family]
    if not mixers:
        common = Counter(type(m).__name__ for m in model.modules() if not isinstance(m, nn.ModuleList))
        found = ", ".join(f"{n} {name}" for name, n in common.most_common(4))
        raise ModelError(
            f"{type(model).__name__}: no state-space layer found (it has {found}); "
            f"known mixers: {', '.join(sorted(f.mixer_class for f in families.values()))}"
        )
    for site in sites:  # a dimension that is no axis may be absent: the MLP rows of mamba_ssm's mixers
        sizes = {name: size for name, size in site.layout.sizes.items() if name in site.layout.axes}
        if none := [f"{name} {size}" for name, size in sizes.items() if size < 1]:
            raise ModelError(f"{site.path}: has {', '.join(none)}; every size must be at least 1")
    for site in mixers:
        check_causal(model.get_submodule(site.path), site.path)
    groups = [
        dependency_group(site.layout, model.get_submodule(site.path), site.path, axis)
        for site in sites
        for axis in site.layout.axes
    ]
    blocks = _block_list(model, mixers[0].path)
    if family:
        groups += _hidden_group(model, sites)
        groups += _block_groups(model, sites, blocks, family) if blocks else []
    return SSMGraph(
        model_class=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        sites=tuple(sites),
        groups={group.name: group for group in groups},
        blocks=blocks,
        family=family,
        elements=element_groups(model, sites, blocks),
    )


def _sites(model: nn.Module, families: dict[str, Family], known: bool) -> list[Site]:
    """Every module that a family or, in a known model, a part describes; one site for all that share parameters."""
    head = model.get_output_embeddings() if known else None  # type: ignore[operator]
    hidden = model.get_input_embeddings().weight.shape[1] if known else 0  # type: ignore[operator]
    found: dict[tuple[object, ...], Site] = {}
    closed: list[str] = []
    open_: list[str] = []
    for path, module in model.named_modules(remove_duplicate=False):
        if any(path.startswith(f"{inside}.") for inside in closed):
            continue
        family = next((f for f in families.values() if f.recognises(module)), None)
        if family:
            kind, layout = family.name, family.layout(module)
        elif known and module is head:
            kind, layout = "head", output_head(hidden)
        else:
            inside_experts = any(path.startswith(f"{inside}.") for inside in open_)
            # Beside the experts there may be an MLP that every token passes; the rest is theirs.
            able = {"mlp": PARTS["mlp"]} if inside_experts else PARTS if known else {}
            parts = ((kind, part(module, hidden)) for kind, part in able.items())
            kind, found_layout = next(((k, made) for k, made in parts if made is not None), ("", None))
            if found_layout is None:
                continue
            layout = found_layout
        (open_ if kind == "experts" else closed).append(path)
        key = (kind, *(id(p) for p in module.parameters()))
        if key in found:
            found[key] = replace(found[key], aliases=(*found[key].aliases, path))
        else:
            parameters = sum(p.numel() for p in module.parameters())
            found[key] = Site(path, kind, layout, parameters, family)
    return list(found.values())


def _hidden_group(model: nn.Module, sites: list[Site]) -> list[DependencyGroup]:
    """The residual stream's width: one group over all sites; none if a parameter of the model is not described."""
    described = [path for site in sites for path in (site.path, *site.aliases)]
    for name, _ in model.named_parameters(remove_duplicate=False):
        if not any(name.startswith(f"{path}.") for path in described):
            return []
    found: list[Member] = []
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for site in sites:
        if "hidden" not in site.layout.sizes:
            return []
        for member in members(site.layout, model.get_submodule(site.path), site.path, "hidden", ()):
            key = (id(_tensor(model, member.tensor)), member.dims)
            if key not in seen:  # a tied head is the embedding
                seen.add(key)
                found.append(member)
    units = sites[0].layout.sizes["hidden"]
    prefix = str(getattr(model, "base_model_prefix", "") or "model")
    # Experts run as one grouped matrix product, which takes rows of a multiple of 16 bytes: 8 units in bf16.
    multiple = 8 if any(site.kind == "experts" for site in sites) else 1
    return [DependencyGroup(prefix, "hidden", 1, units, tuple(found), multiple_of=multiple)]


def _block_groups(model: nn.Module, sites: list[Site], blocks: str, family: Family) -> list[DependencyGroup]:
    """The axes `block` and, where the rest of a block does something without its mixer, `mixer`."""
    count = len(model.get_submodule(blocks))  # type: ignore[arg-type]
    paths = [f"{blocks}.{i}" for i in range(count)]
    owners = Counter(
        id(p) for path in paths for p in {id(p): p for p in model.get_submodule(path).parameters()}.values()
    )
    parameters = dict(model.named_parameters(remove_duplicate=False))

    def writers(path: str) -> tuple[str, ...]:
        """What writes to the residual stream inside `path` and is not shared with another block."""
        names = [
            f"{site.path}.{slot.tensor}"
            for site in sites
            if within(site.path, path)
            for slot in site.layout.slots
            if any(rows.name == "out" for rows in slot.rows)
        ]
        return tuple(n for n in names if n in parameters and owners[id(parameters[n])] == 1)

    whole = tuple(Block(path, writers(path), family.belongings(model, path)) for path in paths)
    groups = [DependencyGroup(blocks, "block", 1, count, (), blocks=whole)]
    if family.mixer_axis:
        mixers = tuple(Block(site.path, writers(site.path)) for site in sites if site.family)
        groups.append(DependencyGroup(blocks, "mixer", 1, len(mixers), (), blocks=mixers))
    return groups


def _block_list(model: nn.Module, mixer: str) -> str:
    """Path of the outermost ModuleList around a mixer, "" if there is none."""
    parts = mixer.split(".")
    for depth in range(1, len(parts)):
        path = ".".join(parts[:depth])
        if isinstance(model.get_submodule(path), nn.ModuleList):
            return path
    return ""


def _tensor(model: nn.Module, name: str) -> Any:
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)


def within(path: str, outer: str) -> bool:
    """Whether the module or parameter at `path` is `outer` or lies inside it."""
    return path == outer or path.startswith(f"{outer}.")
