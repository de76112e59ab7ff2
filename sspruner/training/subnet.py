"""Sub-networks of one model: which elements of its tensors they hold, and the smaller dense models that they are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from sspruner.graph.site import within
from sspruner.graph.trace import trace
from sspruner.plans.plan import Plan
from sspruner.surgery.predict import dropped_modules
from sspruner.surgery.slice import rows_to_drop, slice_model, without_rows
from sspruner.training.shards import Places


class Subnets:
    """Makes sub-networks of a model from plans, all of the same sizes. Holds none of its weights.

    A slice scales some of what stays, so that it equals the mask (graph.layout.Fold): a sub-network's weight is the
    model's times `scales`, by tensor, where that is not 1.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        """plan: any of those to come; it decides the sizes."""
        self.graph = trace(model)
        self.skeleton = _with(model, lambda p: p.detach().to("meta"))
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        first = {id(p): name for name, p in model.named_parameters()}
        self.names = {alias: first[id(p)] for alias, p in model.named_parameters(remove_duplicate=False)}
        ones = _with(model, lambda p: torch.ones(p.shape, device=p.device))
        held = self._cut(ones, plan)
        self.scales = {name: p.detach().flatten() for name, p in held.items() if not bool((p == 1).all())}

    def places(self, plan: Plan) -> Places:
        """Which elements of each tensor a sub-network holds: tensor -> int64, increasing; none if it has no such."""
        gone = dropped_modules(plan, self.graph)
        held = {name for alias, name in self.names.items() if not any(within(alias, path) for path in gone)}
        cuts = {self.names.get(name, name): cut for name, cut in rows_to_drop(plan, self.graph).items()}

        def of(name: str) -> torch.Tensor:
            shape = self.shapes[name] if name in held else torch.Size([0])
            return without_rows(torch.arange(shape.numel()).view(shape), cuts.get(name, {})).flatten()

        return of

    def make(self, plan: Plan, values: Mapping[str, torch.Tensor]) -> tuple[nn.Module, dict[str, nn.Parameter]]:
        """A sub-network with given weights, and its parameters by the names that they have in the model.

        values: the elements that `places` says, fp32 (elements,), of the model.
        """
        model = copy.deepcopy(self.skeleton)
        held = self._cut(model, plan)
        made = {}
        for name, parameter in held.items():
            scaled = values[name] * self.scales[name] if name in self.scales else values[name]
            made[name] = nn.Parameter(scaled.view(parameter.shape).clone(), parameter.requires_grad)
        by_shape = {id(parameter): made[name] for name, parameter in held.items()}
        for module in model.modules():
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[leaf] = by_shape[id(parameter)]
        return model, made

    def weights(self, name: str, parameter: nn.Parameter) -> torch.Tensor:
        """What a sub-network's parameter is in the model: fp32 (elements,)."""
        found = parameter.detach().flatten().float()
        return found / self.scales[name] if name in self.scales else found

    def _cut(self, model: nn.Module, plan: Plan) -> dict[str, nn.Parameter]:
        """Cut a copy of the model; returns its parameters by the names that they had before."""
        before = dict(model.named_parameters())  # kept alive: identities are compared
        first = {id(parameter): name for name, parameter in before.items()}
        slice_model(model, plan, self.graph)
        # A tensor that was cut is another one under its old name; one that was not may have been numbered anew.
        return {first.get(id(p), self.names.get(alias, alias)): p for alias, p in model.named_parameters()}


def _with(model: Any, value: Callable[[nn.Parameter], torch.Tensor]) -> Any:
    """A copy of a model with other parameters; those that are shared stay shared."""
    made = {id(p): nn.Parameter(value(p), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, made)
