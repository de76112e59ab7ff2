"""Our dependency groups around the mixers against torch-pruning's own graph, unit by unit, row by row."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import sspruner
from sspruner.graph.group import DependencyGroup
from support.tp_graph import tp_graph, tp_group
from support.tp_modules import DISTINCT, modules
from support.zoo import zoo

ROOTS = {"attn_head": ("q_proj",), "mlp": ("gate_proj", "gate_up_proj", "input_linear", "up_proj")}


def ours(model: nn.Module, group: DependencyGroup) -> dict[tuple[str, int], tuple[tuple[int, ...], ...]]:
    """(parameter, dimension) -> the rows that each unit owns; a shared parameter under its first name."""
    first = {p: name for name, p in model.named_parameters()}
    every = dict(model.named_parameters(remove_duplicate=False))
    rows: dict[tuple[str, int], list[set[int]]] = {}
    for member in group.members:
        units = member.index.flatten(0, 1).tolist()
        (dim,) = member.dims
        owned = rows.setdefault((first[every[member.tensor]], dim), [set() for _ in units])
        for mine, more in zip(owned, units, strict=True):
            mine.update(more)
    return {key: tuple(tuple(sorted(unit)) for unit in units) for key, units in rows.items()}


def theirs(model: nn.Module, graph: Any, group: DependencyGroup) -> dict[tuple[str, int], tuple[tuple[int, ...], ...]]:
    """torch-pruning's group for the same: rooted at the embedding, at q, or at the first projection of an MLP."""
    if group.axis == "hidden":
        # Inside Zamba's shared blocks the width is not tied to the residual stream: more roots.
        apart = model.config.model_type.startswith("zamba")
        inner = [getattr(m, n) for n in ("o_proj", "down_proj") for same in modules(model, n) for m in same]
        return tp_group(graph, model.get_input_embeddings(), *(inner if apart else []))
    module: Any = model.get_submodule(group.layer)
    root = next(name for name in ROOTS[group.axis] if isinstance(getattr(module, name, None), nn.Linear))
    sharing = next(same for same in modules(model, root) if any(m is module for m in same))
    rows = getattr(module, root).out_features // group.units if group.axis == "attn_head" else 1
    return tp_group(graph, *(getattr(m, root) for m in sharing), units=group.units, rows=rows)


@pytest.mark.slow
@pytest.mark.cover
@pytest.mark.parametrize("family", sorted(DISTINCT))
def test_groups_around_the_mixers_are_torch_prunings(family: str) -> None:
    model = zoo(family, **DISTINCT[family])
    graph = tp_graph(model)
    groups = [g for g in sspruner.trace(model).groups.values() if g.axis in ("hidden", "mlp", "attn_head")]
    assert {g.axis for g in groups} >= {"hidden"}
    for group in groups:
        assert ours(model, group) == theirs(model, graph, group), group.name
