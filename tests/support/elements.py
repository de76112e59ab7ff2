"""Strategies for tests of single elements and of new values, and the biases that a model may get."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import nn

import sspruner
from sspruner.testing.plans import plans


def random_mask(shape: tuple[int, ...], seed: int, density: float = 0.5) -> torch.Tensor:
    """Return a bool mask that keeps about `density` of the elements, never all."""
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density
    keep.view(-1)[seed % keep.numel()] = False
    return keep


def random_like(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """Return new fp32 values near a parameter's own."""
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
    return tensor.detach().float() * (1 + 0.2 * noise)


def biases_lacking(model: nn.Module) -> dict[str, int]:
    """Return the biases that the model may get, name -> length, one name each."""
    found: dict[str, int] = {}
    seen: set[int] = set()
    for site in sspruner.trace(model).sites:
        for slot in site.layout.slots:
            path, _, leaf = f"{site.path}.{slot.tensor}".rpartition(".")
            module = dict(model.named_modules()).get(path)
            if leaf == "bias" and isinstance(module, nn.Linear) and module.bias is None:
                if id(module.weight) not in seen:
                    found[f"{path}.bias"] = module.out_features
                seen.add(id(module.weight))
    return found


@st.composite
def masks(draw: st.DrawFn, graph: sspruner.SSMGraph, most: int = 3) -> dict[str, torch.Tensor]:
    """Draw masks of up to `most` tensors, on both axes if there are two."""
    names = draw(st.lists(st.sampled_from(list(graph.elements)), min_size=1, max_size=most, unique=True))
    seed, density = draw(st.integers(0, 2**16)), draw(st.sampled_from([0.0, 0.3, 0.9]))
    shapes = {n: (graph.elements[n].groups, graph.elements[n].units) for n in names}
    return {n: random_mask(shapes[n], seed + i, density) for i, n in enumerate(names)}


@st.composite
def new_values(draw: st.DrawFn, model: nn.Module, most: int = 3) -> dict[str, torch.Tensor]:
    """Draw new values of some parameters, and of some biases that the model lacks."""
    have, lacking = dict(model.named_parameters()), biases_lacking(model)
    names = draw(st.lists(st.sampled_from(list(have)), max_size=most, unique=True))
    added = draw(st.lists(st.sampled_from(list(lacking)), max_size=most, unique=True)) if lacking else []
    seed = draw(st.integers(0, 2**16))
    values = {name: random_like(have[name], seed + i) for i, name in enumerate(names)}
    return values | {name: random_like(torch.ones(lacking[name]), seed - i) * 0.3 for i, name in enumerate(added)}


@st.composite
def mixed(draw: st.DrawFn, model: nn.Module, values: bool = False) -> sspruner.Plan:
    """Draw a plan of units and elements, or of either alone; optionally with new values."""
    graph = sspruner.trace(model)
    elements = draw(masks(graph)) if draw(st.booleans()) else {}
    groups = draw(plans(graph, most=3)).groups if not elements or draw(st.booleans()) else {}
    updates = draw(new_values(model)) if values else {}
    return sspruner.Plan(groups, elements=elements, updates=updates)
