"""The graph of a model as a tree to print: what can be removed where, with the size of one unit.

Layers that are alike are one branch: `backbone.layers.{0-5}.mixer`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.tree import Tree

from sspruner.axes import WHOLE_MODEL
from sspruner.graph.group import DependencyGroup
from sspruner.graph.site import Site
from sspruner.units import as_bytes

if TYPE_CHECKING:
    from sspruner.graph.ssm_graph import SSMGraph

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def tree(graph: SSMGraph) -> Tree:
    """Return a branch for the layers that are alike, a leaf for each axis, and the tensors that it cuts."""
    root = Tree(
        f"{graph.model_class}: {graph.parameters:,} parameters, {as_bytes(graph.weight_bytes)} of weights, "
        f"{as_bytes(graph.state_bytes)} of state per sequence"
    )
    shown: set[tuple[str, ...]] = set()
    for sites in alike(graph):
        site = sites[0]
        branch = root.add(f"{together([one.path for one in sites])} {_described(site, len(sites))}")
        for group in graph.groups_of(site):
            leaf = branch.add(_units(group))
            lines = _members_by_tensor(group, {f.target for f in site.layout.folds if group.axis in f.over})
            if lines not in shown:  # the same in several kinds of layers: printed once
                shown.add(lines)
                for line in lines:
                    leaf.add(line)
    for group in graph.groups.values():
        if group.axis in WHOLE_MODEL:
            each = "whole modules" if group.blocks else f"{group.parameters_per_unit:,} parameters each"
            root.add(f"{group.name}: {group.units} units, {each}")
    if any(member.tensor.endswith("in_proj.bias") for group in graph.groups.values() for member in group.members):
        root.add("biases of in_proj: padding on the left enters the state, cut or not (docs/saving.md)")
    return root


def alike(graph: SSMGraph) -> list[list[Site]]:
    """Return the sites that have an axis, those together whose paths differ by numbers and whose lines are the same."""
    found: dict[tuple[str, ...], list[Site]] = {}
    for site in graph.sites:
        if groups := graph.groups_of(site):
            key = (NUMBER.sub("*", site.path), _described(site, 1), *map(_units, groups))
            found.setdefault(key, []).append(site)
    return list(found.values())


def together(paths: Sequence[str]) -> str:
    """Return paths that differ in one number as one: `layers.{0, 2-5}.mixer`; else the first, and how many more."""
    if len(paths) == 1:
        return paths[0]
    numbers = [NUMBER.findall(path) for path in paths]
    places = [i for i in range(len(numbers[0])) if len({row[i] for row in numbers}) > 1]
    if len(places) != 1:
        return f"{paths[0]} and {len(paths) - 1} more"
    found = list(NUMBER.finditer(paths[0]))[places[0]]
    these = _ranges(int(row[places[0]]) for row in numbers)
    return f"{paths[0][: found.start()]}{{{these}}}{paths[0][found.end() :]}"


def _ranges(numbers: Iterable[int]) -> str:
    """Return ascending numbers as text, three or more in a row as the first and the last."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def _described(site: Site, count: int) -> str:
    """Return the kind of a site and its sizes; of `count` such sites, those of each."""
    state = f", {as_bytes(site.state_bytes)} of state" if site.family else ""
    shared = f", shared by {1 + len(site.aliases)} layers" if site.aliases else ""
    each = " each" if count > 1 else ""
    return f"({site.kind}): {site.parameters:,} parameters{state}{each}{shared}"


def _units(group: DependencyGroup) -> str:
    """Return the axis of a group, its units, and the size of one."""
    sets = f"{group.groups} groups x {group.units}" if group.groups > 1 else f"{group.units}"
    each = f" and {as_bytes(group.state_bytes_per_unit)} of state" if group.state_bytes_per_unit else ""
    same = ", same count in every group" if group.groups > 1 else ""
    return f"{group.axis}: {sets} units, {group.parameters_per_unit:,} parameters{each} each{same}"


def _members_by_tensor(group: DependencyGroup, folded: set[str]) -> tuple[str, ...]:
    """Return one line per tensor, such as `in_proj.weight dim 0: rows of B, C`, and the tensors that a cut rescales."""
    rows: dict[tuple[str, str], list[str]] = {}
    for m in group.members:
        key = m.tensor.removeprefix(group.layer + "."), ", ".join(map(str, m.dims))
        rows.setdefault(key, []).append(m.rows)
    tensors: dict[tuple[str, ...], list[str]] = {}  # those that differ by a number are one line
    for (name, dims), some in rows.items():
        tensors.setdefault((NUMBER.sub("*", name), dims, *some), []).append(name)
    cut = [f"{together(names)} dim {dims}: rows of {', '.join(some)}" for (_, dims, *some), names in tensors.items()]
    if group.gain:
        tensor, matrix = group.key(group.gain.tensor), group.key(group.gain.into)
        cut.append(f"{tensor} dim 0: one for all groups, moved into {matrix} where these keep other units")
    return (*cut, f"scaled, so that sliced = masked: {', '.join(sorted(folded))}") if folded else tuple(cut)
