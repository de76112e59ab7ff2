"""Build the SSMGraph of a model: find its prunable modules and the dependency groups between their tensors."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from torch import nn

from sspruner.errors import ModelError
from sspruner.graph.causality import SAID, check_causal
from sspruner.graph.elements import element_groups
from sspruner.graph.family import Family
from sspruner.graph.group import Block, DependencyGroup, Member
from sspruner.graph.known import installed_families
from sspruner.graph.layout import dependency_group, members
from sspruner.graph.parts import PARTS, output_head
from sspruner.graph.plain import check_plain
from sspruner.graph.site import Site, within
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.graph.text_model import text_config, text_path
from sspruner.graph.usable import check_usable


def trace(model: nn.Module) -> SSMGraph:
    """Return the SSMGraph of `model`, which is not changed and may be on the meta device.

    Raises ModelError if the model is wrapped or quantised, if it has no layer of a known family, a layer of size 0, a
    tensor that something else computes (an adapter, a mask of another library), or a mixer that is not causal.
    """
    check_usable(model)
    families = installed_families()
    family = families.get(model_type(model))
    sites = _sites(model, families, known=family is not None)
    mixers = [site for site in sites if site.family]
    if not mixers:
        common = Counter(type(m).__name__ for m in model.modules() if not isinstance(m, nn.ModuleList))
        common_names = ", ".join(f"{n} {name}" for name, n in common.most_common(4))
        raise ModelError(
            f"{type(model).__name__}: no state-space layer found (it has {common_names}); "
            f"known mixers: {', '.join(sorted(f.mixer_class for f in families.values()))}"
        )
    for site in sites:
        check_plain(model.get_submodule(site.path), site.path, site.layout)
    for site in sites:  # only axes are checked: other dimensions may be 0, such as the MLP rows of mamba_ssm's mixers
        sizes = {name: size for name, size in site.layout.sizes.items() if name in site.layout.axes}
        if empty := [f"{name} {size}" for name, size in sizes.items() if size < 1]:
            raise ModelError(f"{site.path}: has {', '.join(empty)}; every size must be at least 1")
    for site in mixers:
        if site.family and site.family.causal and not hasattr(model, SAID):
            check_causal(model.get_submodule(site.path), site.path, site.layout.sizes.get("hidden"))
    groups = [
        dependency_group(site.layout, model.get_submodule(site.path), site.path, axis)
        for site in sites
        for axis in site.layout.axes
    ]
    blocks = _block_list(model, mixers[0].path)
    if family and not family.stream_refused:
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


def model_type(model: nn.Module) -> str:
    """Return the model_type of the config, inside a multimodal model that of its text model; "" if there is none."""
    return getattr(text_config(getattr(model, "config", None)), "model_type", None) or ""


def _sites(model: nn.Module, families: dict[str, Family], known: bool) -> list[Site]:
    """Return the sites of all modules that a family or, in a known model, a part describes.

    Modules that share their parameters give one site with aliases.
    """
    head = model.get_output_embeddings() if known else None  # type: ignore[operator]
    hidden = model.get_input_embeddings().weight.shape[1] if known else 0  # type: ignore[operator]
    sites: dict[tuple[object, ...], Site] = {}
    text, closed = text_path(model) if known else "", list[str]()
    open_: list[str] = []
    for path, module in model.named_modules(remove_duplicate=False):
        if any(path.startswith(f"{inside}.") for inside in closed):
            continue
        family = next((f for f in families.values() if f.recognises(module)), None)
        if family:
            kind, layout = family.name, family.layout(module)
        elif known and module is head:
            kind, layout = "head", output_head(hidden)
        elif text and not within(path, text):  # the vision part of a multimodal model
            continue
        else:
            inside_experts = any(path.startswith(f"{inside}.") for inside in open_)
            # Inside a mixture of experts only a shared MLP is described separately.
            candidates = {"mlp": PARTS["mlp"]} if inside_experts else PARTS if known else {}
            parts = ((kind, part(module, hidden)) for kind, part in candidates.items())
            kind, part_layout = next(((k, candidate) for k, candidate in parts if candidate is not None), ("", None))
            if part_layout is None:
                continue
            layout = part_layout
        (open_ if kind == "experts" else closed).append(path)
        key = (kind, *(id(p) for p in module.parameters()))
        if key in sites:
            sites[key] = replace(sites[key], aliases=(*sites[key].aliases, path))
        else:
            parameters = sum(p.numel() for p in module.parameters())
            sites[key] = Site(path, kind, layout, parameters, family)
    return list(sites.values())


def _hidden_group(model: nn.Module, sites: list[Site]) -> list[DependencyGroup]:
    """Return the dependency group of the residual stream's width, over all sites.

    Empty if some parameter of the model is not described by a site: it could not be cut.
    """
    described = [path for site in sites for path in (site.path, *site.aliases)]
    for name, _ in model.named_parameters(remove_duplicate=False):
        if not any(name.startswith(f"{path}.") for path in described):
            return []
    hidden_members: list[Member] = []
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for site in sites:
        if "hidden" not in site.layout.sizes:
            return []
        for member in members(site.layout, model.get_submodule(site.path), site.path, "hidden", ()):
            key = (id(_tensor(model, member.tensor)), member.dims)
            if key not in seen:  # a tied output head shares the embedding's weight
                seen.add(key)
                hidden_members.append(member)
    units = sites[0].layout.sizes["hidden"]
    prefix = str(getattr(model, "base_model_prefix", "") or "model")
    # Experts run as one grouped matrix product, whose rows must be a multiple of 16 bytes: 8 units in bf16.
    multiple = 8 if any(site.kind == "experts" for site in sites) else 1
    return [DependencyGroup(prefix, "hidden", 1, units, tuple(hidden_members), multiple_of=multiple)]


def _block_groups(model: nn.Module, sites: list[Site], blocks: str, family: Family) -> list[DependencyGroup]:
    """Return the groups of the axes `block` and `mixer`; `mixer` only if blocks hold more than their mixer."""
    count = len(model.get_submodule(blocks))  # type: ignore[arg-type]
    paths = [f"{blocks}.{i}" for i in range(count)]
    owners = Counter(
        id(p) for path in paths for p in {id(p): p for p in model.get_submodule(path).parameters()}.values()
    )
    parameters = dict(model.named_parameters(remove_duplicate=False))

    def writers(path: str) -> tuple[str, ...]:
        """Return the parameters inside `path` that write to the residual stream and belong to one block alone."""
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
    """Return the path of the outermost ModuleList around a mixer, "" if there is none."""
    parts = mixer.split(".")
    for depth in range(1, len(parts)):
        path = ".".join(parts[:depth])
        if isinstance(model.get_submodule(path), nn.ModuleList):
            return path
    return ""


def _tensor(model: nn.Module, name: str) -> Any:
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)
