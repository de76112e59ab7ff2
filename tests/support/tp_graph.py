"""Torch-Pruning's own dependency graph: an independent reference for dependency groups.

`tp_group(tp_graph(model), module)` is {(parameter name, dim): rows of unit 0, rows of unit 1, ...}. Tests of its
reliability are in tests/unit/scorers/test_torch_pruning.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch_pruning.dependency import graph as graph_module
from torch_pruning.pruner import function

#: What torch-pruning's handlers remove: (attribute, dimension).
REMOVES: dict[Callable[..., Any], tuple[tuple[str, int], ...]] = {
    function.prune_linear_out_channels: (("weight", 0), ("bias", 0)),
    function.prune_linear_in_channels: (("weight", 1),),
    function.prune_embedding_out_channels: (("weight", 1),),
}

Rows = dict[tuple[str, int], tuple[tuple[int, ...], ...]]


class EndlessWalk(Exception):
    """Error: torch-pruning walks its graph without end, with ever new indices."""


class _Bounded(tp.Group):  # type: ignore[misc]
    """A group that stops a walk when it has more operations than any valid group: a few for each node."""

    limit = 0

    def add_dep(self, dep: Any, idxs: Any) -> None:
        if len(self) >= self.limit:
            raise EndlessWalk(f"more than {self.limit} operations in one group")
        super().add_dep(dep, idxs)


def tp_graph(model: nn.Module, length: int = 9) -> tp.DependencyGraph:
    """Return torch-pruning's graph of a causal LM, with the workarounds that it needs.

    - No cache object, which it cannot flatten.
    - Eager attention: it knows grouped queries by the `expand` in eager's repeat_kv.
    - No rotary embedding. That turns the channels of a head among themselves, but torch-pruning takes its `cat` for a
      concatenation of whole projections, and then walks for ever.
    - Fused experts write the hidden size along dim 1 of down_proj; of a bare parameter it would cut the last one.
    - A hack for vision transformers, no index mapping behind a three-dimensional parameter, is undone: it stops
      torch-pruning from seeing that a packed MLP behind experts is packed.
    - Zamba's mixer, on whose splits it fails, becomes in_proj and out_proj.
    """
    ids = torch.arange(length)[None] % model.config.vocab_size
    implementation = model.config._attn_implementation
    fused = {parameter: 1 for name, parameter in model.named_parameters() if name.endswith("experts.down_proj")}
    with pytest.MonkeyPatch.context() as patch:
        for code in {sys.modules[type(module).__module__] for module in model.modules()}:
            if hasattr(code, "apply_rotary_pos_emb"):
                patch.setattr(code, "apply_rotary_pos_emb", lambda q, k, *_args, **_kwargs: (q, k))
        for kind in {type(module) for module in model.modules()}:
            if kind.__name__ == "ZambaMambaMixer":
                patch.setattr(kind, "forward", _in_and_out)
        model.set_attn_implementation("eager")
        try:
            graph = tp.DependencyGraph().build_dependency(
                model,
                ids,
                forward_fn=lambda m, x: m(x, use_cache=False).logits,
                unwrapped_parameters=list(fused.items()),
                verbose=False,
            )
        finally:
            model.set_attn_implementation(implementation)
    for node in graph.module2node.values():
        if node.type == tp.ops.OPTYPE.SPLIT and all(isinstance(n.module, nn.Linear) for n in node.inputs):
            node.enable_index_mapping = True
    return graph


def _in_and_out(mixer: Any, hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
    inner: torch.Tensor = mixer.in_proj(hidden_states)[..., : mixer.out_proj.in_features]
    return mixer.out_proj(inner)


def tp_group(graph: tp.DependencyGraph, *roots: nn.Module, units: int | None = None, rows: int = 1) -> Rows:
    """Return the rows coupled to each unit, `rows` neighbouring output channels of a root, by torch-pruning's graph.

    roots: Linears or Embeddings; the rows of several roots are joined, as needed for a block that several layers
    share. units: only this many, from the first (of a packed [gate | up]: half of them).
    A shared parameter has the first of its names, and () where a unit does not touch it. Raises what torch-pruning
    raises, and EndlessWalk.
    """
    names = {parameter: name for name, parameter in graph.model.named_parameters()}
    units = units or graph.get_out_channels(roots[0]) // rows
    found: dict[tuple[str, int], list[set[int]]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_module, "Group", _Bounded)
        patch.setattr(_Bounded, "limit", 4 * len(graph.module2node))
        for root, unit in product(roots, range(units)):
            handler = graph.get_pruner_of_module(root).prune_out_channels
            for dep, idxs in graph.get_pruning_group(root, handler, list(range(unit * rows, (unit + 1) * rows))):
                target = dep.target.module
                if isinstance(target, nn.Parameter):  # of no layer that torch-pruning knows, an RMSNorm for one
                    slices = [(target, dep.target.pruning_dim)]
                elif any(True for _ in target.parameters()):
                    slices = [(getattr(target, name), dim) for name, dim in REMOVES[dep.handler]]
                else:
                    continue  # an operation without weights
                for parameter, dim in slices:
                    if parameter is not None:
                        found.setdefault((names[parameter], dim), [set() for _ in range(units)])[unit].update(idxs)
    return {key: tuple(tuple(sorted(unit)) for unit in sets) for key, sets in found.items()}
