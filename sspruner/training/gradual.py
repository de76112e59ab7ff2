"""Gradual pruning by weight and gradient during training: the removed fraction grows, and nothing comes back.

S = |w| |g|^alpha                                            of an element; of a unit the sum over its elements
s_t = s_f (1 - (1 - (t - t_0) / (T - t_0))^3)                fraction removed at step t; 0 before t_0

g: the mean of |dL/dw| over the steps since the last mask. Elements compete under one threshold for the whole model,
with a floor for every tensor (budgets.elements). Source: Shihab et al., arXiv 2505.08299 (unstructured pruning of
Mamba; schedule of Zhu & Gupta, arXiv 1710.01878). Units of the graph's axes are our extension: the same scores and
schedule, one fraction for every layer or one threshold for all, and a slice at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sspruner.axes import ELEMENT_AXES
from sspruner.budgets.decide import plan
from sspruner.calibrate.sources import calibration
from sspruner.calibrate.view import SSMView
from sspruner.compute.device import check_whole
from sspruner.compute.quick import quick_on_cpu
from sspruner.errors import InputError
from sspruner.graph.family import DeltaProjected
from sspruner.graph.fingerprint import fingerprint
from sspruner.graph.group import ZERO, DependencyGroup
from sspruner.graph.trace import trace
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import reduction
from sspruner.recipes.train import GradualRecipe
from sspruner.scoring.score import score
from sspruner.scoring.scorer import Scorer
from sspruner.scoring.scores import Scores
from sspruner.surgery.apply import apply
from sspruner.surgery.mask import dropped
from sspruner.surgery.tensors import tensor
from sspruner.training.arguments import recipe_of
from sspruner.training.distil import check_teacher, distillation
from sspruner.training.examples import Examples
from sspruner.training.loop import ANEW, Objective, Trained, gradients_on, train
from sspruner.training.run import run_folder
from sspruner.training.text import Text

LEAST = 1e-37  # the lowest score of remaining units; removed ones have 0


def gradual(
    model: nn.Module,
    text: Text | Examples,
    out: str | Path,
    recipe: GradualRecipe | None = None,
    *,
    teacher: nn.Module | None = None,
    progress: Callable[[dict[str, float], int, int], None] | None = None,
    **short: Any,
) -> tuple[nn.Module, Plan, Trained]:
    """Train a model and prune it during training. Return the cut model, the plan of the cut, and the run's record.

    Args:
        text: the training text, instead of the recipe's; or `Examples`, for a model that is no language model.
        out: the folder of the run (docs/train.md).
        recipe: a `GradualRecipe`; or its fields as `short` arguments: `gradual(..., axis="state", sparsity=0.5)`, or
            `settings`, a `Settings`. `every` is `mask_every`.
        teacher: also distil from this model, as in `distil`, with alpha 0.5.
        progress: called with the metrics of a step, its number, and the number of steps.

    Raises:
        InputError: for invalid arguments, and if a state stops decaying.
        ModelError: for a teacher with another vocabulary.
    """
    check_whole(model, "training")
    if teacher is not None:
        check_whole(teacher, "a teacher")
    gradients_on(model)
    recipe = recipe_of(GradualRecipe, recipe, text, short, {"every": "mask_every"})
    settings, method = recipe.settings, recipe.method
    if method.teacher is not None and teacher is None:
        raise InputError(f"teacher {method.teacher}: load it, and give the model as teacher=")
    probe, objective = task_of(model, text, teacher, settings.at_once)
    steps = settings.steps
    schedule = Schedule(method.sparsity, int(method.begin * steps), max(1, int(method.end * steps)), method.mask_every)
    run_settings: dict[str, Any] = {"method": "gradual", "model": fingerprint(model), "axis": method.axis}
    run_settings |= {"alpha": method.alpha, "allocation": method.allocation}
    run_settings |= {"teacher": fingerprint(teacher) if teacher else None} | asdict(schedule)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    model = model.float()
    pruner = Pruner(model, method.axis, schedule, method.alpha, method.allocation, probe)
    folder = run_folder(out, run_settings | settings.identity() | text.identity(), recipe)
    more: dict[str, Any] = {"after_step": pruner, "memory": pruner.memory, "progress": progress}
    with quick_on_cpu(teacher, next(model.parameters()).device) if teacher is not None else nullcontext():
        record = train(model, text, settings, objective, folder, **more)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    cut_plan = pruner.final()
    model.requires_grad_(False).eval()
    if cut_plan.drops:  # empty if max_minutes stopped the run before the first mask
        apply(model, cut_plan)
    return model, cut_plan, record


def task_of(
    model: nn.Module, text: Text | Examples, teacher: nn.Module | None, at_once: int
) -> tuple[torch.Tensor, Objective]:
    """Return the first held-out inputs, on which decay is checked, and the loss function. at_once: how many."""
    if isinstance(text, Text):
        if teacher is None:
            return text.held_out_blocks()[:at_once], likelihood
        check_teacher(model, teacher)
        return text.held_out_blocks()[:at_once], distillation(teacher.to(next(model.parameters()).device))
    text.check(model)
    if teacher is not None:
        raise InputError("teacher: distils what a language model predicts; leave it out where you give examples")
    return text.probe(model, at_once), text.objective


def likelihood(model: nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the mean cross entropy of the next token, and no parts. tokens: (b, T)."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()), {}


@dataclass(frozen=True)
class Schedule:
    """Fraction to remove at each step.

    begin: the last step with nothing removed; end: the first with the whole fraction removed; every: steps between
    masks.
    """

    sparsity: float
    begin: int
    end: int
    every: int

    def __post_init__(self) -> None:
        if not 0 <= self.begin < self.end or self.every < 1:
            raise InputError(f"schedule: begins at {self.begin}, ends at {self.end}, every {self.every} steps")

    def at(self, step: int) -> float:
        """Return the fraction to remove at a step, s_t."""
        left = 1 - (min(max(step, self.begin), self.end) - self.begin) / (self.end - self.begin)
        return self.sparsity * (1 - left**3)

    def due(self, step: int) -> bool:
        """Check whether a new mask is computed after this step."""
        return step == self.end or (self.begin < step < self.end and step % self.every == 0)


class Pruner:
    """Masks of a run, and the gradients since the last mask; called after every step.

    memory: for checkpoints: `kept.<group>`, bool (groups, units); `slope.<parameter>`, the sum of |g|.
    """

    def __init__(
        self, model: nn.Module, axis: str, schedule: Schedule, alpha: float, allocation: str, probe: torch.Tensor
    ) -> None:
        """Prepare the masks. probe: tokens, int64 (b, T), or values that the model reads, on which the decay of the
        states is checked after every mask.
        """
        self.model, self.schedule, self.alpha, self.probe = model, schedule, alpha, probe
        self.budget: dict[str, Any] = {"granularity": "global"} if axis in ELEMENT_AXES else {"allocation": allocation}
        self.graph = trace(model)
        self.groups = self.graph.on_axis(axis)
        if any(member.mask != ZERO for group in self.groups.values() for member in group.members):
            raise InputError(
                f"axis {axis}: gradual pruning sets weights to zero while it trains, which bars no expert from the "
                "choice; cut with sspruner.prune, then train what stays: sspruner train distil"
            )
        self.parameters = dict(model.named_parameters())
        scored = {name for group in self.groups.values() for name in _tensors(group)}
        self.trained = {name: p for name, p in self.parameters.items() if name in scored and p.requires_grad}
        self.memory = {f"kept.{n}": torch.ones(g.groups, g.units, dtype=torch.bool) for n, g in self.groups.items()}
        self.memory |= {f"slope.{name}": torch.zeros_like(p) for name, p in self.trained.items()}
        self.plan(schedule.sparsity)  # raises before training if this cut is impossible

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        for name, parameter in self.trained.items():
            if parameter.grad is not None:
                self.memory[f"slope.{name}"] += parameter.grad.abs()
        if self.schedule.due(step):
            with suppress(InputError):  # less than one unit; the final cut was tried in __init__
                new = self.plan(self.schedule.at(step))
                for name in self.groups:
                    self.memory[f"kept.{name}"] &= self.kept(new, name)
            for name in self.trained:
                self.memory[f"slope.{name}"].zero_()
        self.zero()
        if self.schedule.due(step):
            self.check_decay(step)

    def scores(self) -> dict[str, torch.Tensor]:
        """Return the importance of every unit, fp32 (groups, units); removed units have less than any that remains."""
        importance = {}
        for name, group in self.groups.items():
            keys = {group.key(t): t for t in _tensors(group) if t in self.trained}
            weights = group.gather({key: self.parameters[t].detach() for key, t in keys.items()})
            slopes = group.gather({key: self.memory[f"slope.{t}"] for key, t in keys.items()})
            parts = [(weights[key].abs() * slopes[key] ** self.alpha).sum(-1) for key in weights]  # (groups, units)
            kept = self.memory[f"kept.{name}"].to(parts[0].device)
            importance[name] = torch.stack(parts).sum(0).clamp_min(LEAST).masked_fill(~kept, 0.0).cpu()
        return importance

    def plan(self, sparsity: float) -> Plan:
        """Return the plan for a fraction to remove. Raises InputError if it removes nothing."""
        return plan(self.graph, Scores(self.scores()), sparsity=sparsity, **self.budget)

    def kept(self, plan: Plan, name: str) -> torch.Tensor:
        """Return the units of one group that a plan keeps: bool (groups, units)."""
        if name in plan.elements:
            return plan.elements[name]
        stays = torch.ones_like(self.memory[f"kept.{name}"])
        if name in plan.groups:
            for i in range(len(stays)):
                stays[i, plan.groups[name].dropped(i)] = False
        return stays

    @torch.no_grad()
    def zero(self) -> None:
        """Set removed weights to zero."""
        for name, group in self.groups.items():
            kept = self.memory[f"kept.{name}"]
            if kept.all():
                continue
            if group.tensor:
                data = tensor(self.model, group.tensor).data
                data.mul_(kept.to(data.device))
                continue
            for t, dims, rows, _ in dropped(group, reduction(kept), self.model):
                data = tensor(self.model, t).data
                front = data.movedim(dims, tuple(range(len(dims))))
                front[torch.unravel_index(rows.to(data.device), front.shape[: len(dims)])] = 0

    def check_decay(self, step: int) -> None:
        """Raise InputError if a state stops decaying, or is lost in one step: a decay outside (0, 1)."""
        for layer, (low, high) in decay_ranges(self.model, self.probe).items():
            if not 0 < low <= high < 1:
                raise InputError(
                    f"step {step}: the decay of {layer} is from {low:g} to {high:g}, outside (0, 1); {ANEW}"
                )

    def final(self) -> Plan:
        """Return the plan that cuts the removed units."""
        kept = {name: self.memory[f"kept.{name}"] for name in self.groups}
        kept = {name: stays for name, stays in kept.items() if not stays.all()}
        return Plan(
            {name: reduction(stays) for name, stays in kept.items() if not self.groups[name].tensor},
            {"fingerprint": fingerprint(self.model)},
            {"method": "gradual", "alpha": self.alpha},
            elements={name: stays for name, stays in kept.items() if self.groups[name].tensor},
        )


def decay_ranges(model: nn.Module, tokens: torch.Tensor) -> dict[str, tuple[float, float]]:
    """Return the least and the most of a mixer's decay, exp(dt A) or a delta rule's own, over tokens (b, T), or values
    that the model reads, and heads, channels and states; fp64.
    """
    ranges: dict[str, tuple[float, float]] = {}

    class Decay(Scorer):
        name, axes, needs = "decay", {"state"}, "activations"

        def observe(self, view: SSMView) -> None:
            if isinstance(view.projected, DeltaProjected):
                decay = view.projected.decay.double().exp()  # (b, T, H), or (b, T, H, K)
            else:
                dt, A = view.dt.double(), view.A.double()  # (b, T, H) and (H,), or (b, T, G, P) and (G, P, N)
                decay = torch.exp(dt * A if A.ndim == 1 else dt[..., None] * A)
            low, high = ranges.get(view.layer, (math.inf, -math.inf))
            ranges[view.layer] = min(low, float(decay.min())), max(high, float(decay.max()))
            self.units = view.C.shape[-2:]

        def importance(self) -> torch.Tensor:
            return torch.ones(self.units)

    training, device = model.training, str(next(model.parameters()).device)
    data = calibration(tokens, model, samples=len(tokens), held_out=0)
    score(model, Decay, axis="state", calibration=data, device=device)
    model.train(training)
    return ranges


def _tensors(group: DependencyGroup) -> list[str]:
    return [group.tensor] if group.tensor else [m.tensor for m in group.members if m.counted]
