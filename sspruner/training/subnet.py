"""Sub-networks of one model: their elements of its tensors, and the smaller dense models made of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from sspruner.graph.site import within
from sspruner.graph.trace import trace
from sspruner.plans.plan import Plan
from sspruner.surgery.predict import dropped_modules
from sspruner.surgery.slice import Cuts, rows_to_drop, slice_model, without_rows
from sspruner.training.shards import Places, Runs


class Subnets:
    """Maker of sub-networks of a model from plans of equal sizes. Holds none of the model's weights.

    A slice scales some of the remaining weights, so that it equals the mask (graph.layout.Fold): a sub-network's weight
    is the model's times `scales`, by tensor, where that is not 1.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        """Prepare the sizes. plan: any of the plans to come; all have the same sizes."""
        self.graph = trace(model)
        self.skeleton = _with(model, lambda p: p.detach().to("meta"))
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        first = {id(p): name for name, p in model.named_parameters()}
        self.names = {alias: first[id(p)] for alias, p in model.named_parameters(remove_duplicate=False)}
        ones = _with(model, lambda p: torch.ones(p.shape, device=p.device))
        parameters = self._cut(ones, plan)
        self.scales = {name: p.detach().flatten() for name, p in parameters.items() if not bool((p == 1).all())}

    def places(self, plan: Plan) -> Places:
        """Return which elements of each tensor a sub-network has; no run of one that it has none of."""
        dropped = dropped_modules(plan, self.graph)
        present = {name for alias, name in self.names.items() if not any(within(alias, path) for path in dropped)}
        cuts = {self.names.get(name, name): cut for name, cut in rows_to_drop(plan, self.graph).items()}

        def of(name: str) -> Runs:
            shape = self.shapes[name]
            none = Runs(torch.zeros(0, dtype=torch.long), shape.numel())
            return kept_runs(shape, cuts.get(name, {})) if name in present else none

        return of

    def make(self, plan: Plan, values: Mapping[str, torch.Tensor]) -> tuple[nn.Module, dict[str, nn.Parameter]]:
        """Return a sub-network with given weights, and its parameters by their names in the model.

        values: the model's elements at `places`, fp32 (elements,).
        """
        model = copy.deepcopy(self.skeleton)
        cut = self._cut(model, plan)
        parameters = {}
        for name, parameter in cut.items():
            scaled = values[name] * self.scales[name] if name in self.scales else values[name]
            parameters[name] = nn.Parameter(scaled.view(parameter.shape).clone(), parameter.requires_grad)
        by_shape = {id(parameter): parameters[name] for name, parameter in cut.items()}
        for module in model.modules():
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[leaf] = by_shape[id(parameter)]
        return model, parameters

    def weights(self, name: str, parameter: nn.Parameter) -> torch.Tensor:
        """Return a sub-network's parameter in the scale of the model: fp32 (elements,)."""
        values = parameter.detach().flatten().float()
        return values / self.scales[name] if name in self.scales else values

    def _cut(self, model: nn.Module, plan: Plan) -> dict[str, nn.Parameter]:
        """Cut a copy of the model. Return its parameters by their names before the cut."""
        before = dict(model.named_parameters())  # kept alive: identities are compared
        first = {id(parameter): name for name, parameter in before.items()}
        slice_model(model, plan, self.graph)
        # A cut tensor is a new object under its old name; an uncut one may have a new number in its name.
        return {first.get(id(p), self.names.get(alias, alias)): p for alias, p in model.named_parameters()}


def kept_runs(shape: torch.Size, cuts: Cuts) -> Runs:
    """Return the elements of a tensor that a slice keeps, in runs as long as the cuts of its dimensions allow."""
    if not cuts:
        return Runs(torch.zeros(1, dtype=torch.long), shape.numel())
    last = max(dim for dims in cuts for dim in dims)  # no later dimension is cut
    sizes, length = [*shape[: last + 1]], shape[last + 1 :].numel()
    if [dims for dims in cuts if last in dims] == [(last,)]:  # cut by itself: heads are blocks of rows
        rows = cuts[last,]
        block = block_size(rows, sizes[last])
        cuts, length = {**cuts, (last,): rows[::block] // block}, length * block
        sizes[last] //= block
    return Runs(without_rows(torch.arange(math.prod(sizes)).view(sizes), cuts).flatten(), length)


def block_size(rows: torch.Tensor, size: int) -> int:
    """Return the largest length of blocks that are among `rows` as a whole or not at all. rows: increasing."""
    ends = (rows.diff() != 1).nonzero().flatten()
    bounds = torch.cat([rows[:1], rows[ends] + 1, rows[ends + 1], rows[-1:] + 1])
    return math.gcd(size, *bounds.tolist())


def _with(model: Any, value: Callable[[nn.Parameter], torch.Tensor]) -> Any:
    """Return a copy of a model with other parameters; shared parameters stay shared."""
    parameters = {id(p): nn.Parameter(value(p), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, parameters)
