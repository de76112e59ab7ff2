"""Trace: find what can be removed from a model, and describe it as an SSMGraph."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from torch import nn

from sspruner.errors import ModelError
from sspruner.graph.causality import check_causal
from sspruner.graph.elements import element_groups
from sspruner.graph.family import Family
from sspruner.graph.group import Block, DependencyGroup, Member
from sspruner.graph.known import installed_families
from sspruner.graph.layout import dependency_group, members
from sspruner.graph.parts import PARTS, output_head
from sspruner.graph.site import Site, within
from sspruner.graph.ssm_graph import SSMGraph


def trace(model: nn.Module) -> SSMGraph:
    """Describe what can be removed from `model`, layer by layer. The model is not changed and may be on meta.

    Raises ModelError if the model has no layer of a known family or one without size, or if the installed code of a
    mixer is not causal.
    """
    families = installed_families()
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
