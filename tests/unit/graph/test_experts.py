"""Mixtures of experts as units: their layouts in nine families, and what a cut has to leave."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sspruner.graph.experts import EXPERTS, experts, shared_copies
from sspruner.graph.group import BARRED, BARRED_LOGITS
from sspruner.graph.layout import Layout, dependency_group
from sspruner.graph.parts import PARTS
from sspruner.graph.site import Site
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Selection
from sspruner.surgery.mask import mask, unmask
from sspruner.surgery.slice import slice_model
from sspruner.testing.plans import permute
from support.examples import examples
from support.moe import FAMILIES, block
from support.tensors import same, tensors

HIDDEN = 16


def graph_of(module: nn.Module) -> SSMGraph:
    """The graph of a model that is one mixture of experts, under the name `moe`."""
    sites = []
    for path, part in module.named_modules():
        kind, layout = next(
            ((k, found) for k in ("experts", "mlp") if (found := PARTS[k](part, HIDDEN)) is not None), ("", None)
        )
        if layout is not None:
            sites.append(Site(path, kind, layout, sum(p.numel() for p in part.parameters())))
    groups = [
        dependency_group(site.layout, module.get_submodule(site.path), site.path, axis)
        for site in sites
        for axis in site.layout.axes
    ]
    return SSMGraph("MoE", 0, 0, tuple(sites), {group.name: group for group in groups})


def selected(data: st.DataObject, graph: SSMGraph, axes: tuple[str, ...]) -> Plan:
    """A random selection on each of some axes, where there is one to draw."""
    groups = {}
    for name, group in graph.groups.items():
        if group.axis in axes and len(group.counts()):
            after = data.draw(st.sampled_from(group.counts()))
            order = torch.rand(group.groups, group.units, generator=torch.Generator().manual_seed(after)).argsort(-1)
            keep = tuple(tuple(sorted(row[:after].tolist())) for row in order)
            groups[name] = Selection(group.units, keep)
    return Plan(groups)


def inputs(tokens: int = 40) -> torch.Tensor:
    return torch.randn(2, tokens // 2, HIDDEN, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_fill_their_tensors_and_say_the_attributes(family: str) -> None:
    module = block(family)
    layout = experts(module, HIDDEN)
    assert layout is not None
    assert PARTS["experts"] is experts
    named: dict[str, Any] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    described = set()
    for slot in layout.slots:
        if slot.tensor in named:
            shape = named[slot.tensor].shape
            extent = 1
            for d in slot.tensor_dims:
                extent *= shape[d]
            assert extent == sum(layout.count(slot.outer + rows.dims) for rows in slot.rows), slot
            described |= {(slot.tensor, d) for d in slot.tensor_dims}
    own = {n: p for n, p in named.items() if "shared_expert." not in n and "shared_experts." not in n}
    whole = {(n, d) for n, p in own.items() for d in range(p.ndim)}
    assert described == whole - {("shared_expert_gate.weight", 0)}
    for attribute, size in layout.attributes.items():
        owner, _, leaf = attribute.rpartition(".")
        found = dict(module.named_modules()).get(owner)
        assert getattr(found, leaf, layout.total(size)) == layout.total(size), attribute


@pytest.mark.parametrize("family", FAMILIES)
@examples(6)
@given(data=st.data())
def test_masked_equals_sliced(family: str, data: st.DataObject) -> None:
    """Every axis alone and all together; an odd number of tokens, so that groups do not come out even by chance."""
    module = nn.ModuleDict({"moe": block(family)})
    graph = graph_of(module)
    axes = data.draw(st.sampled_from([("expert",), ("expert_mlp",), ("latent",), ("expert", "expert_mlp", "latent")]))
    plan = selected(data, graph, axes)
    if not plan.groups:
        return
    x, before = inputs(), tensors(module)
    sliced = copy.deepcopy(module)
    slice_model(sliced, plan, graph)
    mask(module, plan, graph)
    with torch.no_grad():
        masked, cut = module["moe"](x), sliced["moe"](x)
    assert (masked - cut).abs().max() <= 1e-6 * masked.abs().max()
    unmask(module)
    assert same(tensors(module), before)
    with torch.no_grad():
        assert not torch.equal(module["moe"](x), masked)  # the mask did something, and it is gone


@pytest.mark.parametrize("family", FAMILIES)
def test_zeroed_experts_are_not_the_cut(family: str) -> None:
    """Their place among the top k would stay taken: what the mask is for."""
    module = nn.ModuleDict({"moe": block(family)})
    graph = graph_of(module)
    group = graph.groups["moe:expert"]
    keep = tuple(range(1, group.units))
    plan = Plan({group.name: Selection(group.units, (keep,) * group.groups)})
    zeroed, sliced, x = copy.deepcopy(module), copy.deepcopy(module), inputs()
    slice_model(sliced, plan, graph)
    with torch.no_grad():
        dense = module["moe"](x)
        for name in ("gate_up_proj", "up_proj", "down_proj"):
            if hasattr(zeroed["moe"].experts, name):
                weight = getattr(zeroed["moe"].experts, name)
                weight.view(group.groups, group.units, *weight.shape[1:])[:, 0] = 0
        wrong, right = zeroed["moe"](x), sliced["moe"](x)
    assert (wrong - right).abs().max() > 1e-2 * dense.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_permuted_experts_compute_the_same(family: str) -> None:
    """Within their routing groups, whose neighbours share a score."""
    module = nn.ModuleDict({"moe": block(family)})
    graph, x = graph_of(module), inputs()
    with torch.no_grad():
        before = module["moe"](x)
        for axis in ("expert", "expert_mlp"):
            group = graph.groups[f"moe:{axis}"]
            orders = torch.rand(group.groups, group.units, generator=torch.Generator().manual_seed(0)).argsort(-1)
            permute(module, group, orders)
            assert (module["moe"](x) - before).abs().max() <= 1e-5 * before.abs().max()


def without_idle(family: str, seed: int) -> float:
    """How far the output moves, of its largest, if the nearest of the experts without tokens goes in every group."""
    module = nn.ModuleDict({"moe": block(family, seed=seed)})
    graph, x = graph_of(module), inputs(4)
    group, gate = graph.groups["moe:expert"], getattr(module["moe"], "gate", None) or module["moe"].router
    with torch.no_grad():
        scores, _, used = gate(x.view(-1, HIDDEN))
        counts = torch.bincount(used.flatten(), minlength=group.groups * group.units)
        dense = module["moe"](x)
    near = scores.float().sigmoid().mean(0) + getattr(gate, "e_score_correction_bias", 0.0)
    idle = near.masked_fill(counts > 0, -torch.inf).view(group.groups, group.units)
    if not idle.isfinite().any(-1).all():
        return 0.0
    keep = tuple(tuple(i for i in range(group.units) if i != int(gone)) for gone in idle.argmax(-1))
    slice_model(module, Plan({group.name: Selection(group.units, keep)}), graph)
    with torch.no_grad():
        return float((module["moe"](x) - dense).abs().max() / dense.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_an_expert_without_tokens(family: str) -> None:
    """Nothing changes where the weights of the others do not depend on it; in Jamba, and among routing groups, it does.

    Of the routers in eight random blocks: sigmoid scores are taken unsorted, so that a sum may round differently.
    """
    change = max(without_idle(family, seed) for seed in range(8))
    if family in ("jamba", "bailing_hybrid"):
        assert change > 1e-3
    else:
        assert change <= (0 if family == "granitemoehybrid" else 1e-6)


@pytest.mark.parametrize(
    ("family", "least", "why"),
    [
        ("granitemoehybrid", 3, "a token takes 3 experts"),
        ("bailing_hybrid", 2, "a token takes 3 experts from the 2 best of 4 routing groups"),
        ("jamba", 3, "a token takes 3 experts"),
    ],
)
def test_what_has_to_stay(family: str, least: int, why: str) -> None:
    group = graph_of(nn.ModuleDict({"moe": block(family)})).groups["moe:expert"]
    assert group.least == least
    assert why in group.why_least
    assert list(group.counts()) == list(range(least, group.units))


def test_one_expert_alone_does_not_stay() -> None:
    group = graph_of(nn.ModuleDict({"moe": block("jamba", top_k=1)})).groups["moe:expert"]
    assert (group.least, group.why_least) == (2, "one expert alone is no mixture")


@pytest.mark.parametrize("family", FAMILIES)
def test_sigmoid_routers_are_masked_by_their_bias(family: str) -> None:
    """And the others by their logits: one of the two, never neither."""
    group = graph_of(nn.ModuleDict({"moe": block(family)})).groups["moe:expert"]
    ways = {member.tensor.rpartition(".")[2]: member.mask for member in group.members if member.mask != "zero"}
    sigmoid = family in ("nemotron_h", "bailing_hybrid", "kimi_linear", "glm5_next")
    assert ways == ({"e_score_correction_bias": BARRED} if sigmoid else {"weight": BARRED_LOGITS})


def test_experts_without_stacked_weights_are_left_alone() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(HIDDEN, 4, bias=False)
            self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(4))

    assert experts(Listed(), HIDDEN) is None
    odd = block("granitemoehybrid")
    odd.experts.is_transposed = True
    assert experts(odd, HIDDEN) is None


def test_groups_are_runs_of_neighbours() -> None:
    layout: Layout | None = experts(block("bailing_hybrid"), HIDDEN)
    assert layout is not None
    slot = layout.slots[0]
    rows = layout.index_map(slot, slot.rows[0], "expert", layout.axes["expert"])[..., 0]
    assert rows.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert layout.count(EXPERTS) == 16


@pytest.mark.parametrize(("neurons", "copies"), [(24, {2}), (16, {3}), (8, {6}), (32, {1, 2})])
def test_a_shared_experts_width_in_copies_of_an_expert(neurons: int, copies: set[int]) -> None:
    """48 neurons: no config can say one and a half."""
    graph = graph_of(nn.ModuleDict({"moe": block("kimi_linear")}))
    layouts = {site.path: site.layout for site in graph.sites}
    assert {path: layout.sizes.get("mlp") for path, layout in layouts.items()} == {
        "moe": None,
        "moe.shared_experts": 48,
    }
    layouts["moe"] = layouts["moe"].resized({"expert_mlp": neurons})
    assert shared_copies(layouts) == copies
