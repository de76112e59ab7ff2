"""Fit: train one cut module to put out what the dense one puts out, and keep what held-out windows confirm.

Adam, one window a step, warm-up and cosine decay (docs/refit.md has the measurements). Of several processes each holds
a part of the windows; the one that holds the window of a step computes its gradient, so that the values are the same
for any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from sspruner.compute.processes import from_one, total
from sspruner.pruning.student import Call, Student

RATE = 1e-2  # learning rate of Adam for the rows of a selected state; 5e-3 to 2e-2 end alike
WIDE_RATE = 5e-4  # where most of a module is trained, as on heads: 2e-3 is better on its own text, worse on others
PROJECTED_RATE = 1e-3  # where the state was projected: it starts nearer to the dense module, and 1e-2 only harms
WARM_UP = 1 / 20  # share of the steps
TINY = 1e-30  # energy of a module that puts out nothing
CHECKS = 4  # how often the held-out error is measured


@dataclass(frozen=True)
class Lesson:
    """What a student learns from.

    training         numbers of the windows that train
    held_out         kind of text -> numbers of the windows that are held out
    calls, targets   by number, of the windows that this process holds: arguments of the module's calls, and the output
                     of the dense module on them, (1, T, width)
    """

    training: Sequence[int]
    held_out: Mapping[str, Sequence[int]]
    calls: Mapping[int, Call]
    targets: Mapping[int, torch.Tensor]


@dataclass(frozen=True)
class Fitted:
    """Outcome of one module's training.

    values    of the best step, as they will be stored; None if no step is better than the start
    errors    kind of held-out text -> squared error over the energy of the dense output, before and after
    step      the step that is kept, 0 for the start
    steps     steps that were made
    stopped   why training ended before its last step, "" if it did not
    """

    values: dict[str, torch.Tensor] | None
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    step: int = 0
    steps: int = 0
    stopped: str = ""


def fit(student: Student, lesson: Lesson, steps: int, seed: int, late: Callable[[], bool]) -> Fitted:
    """Train a student for a number of steps, or until it is `late`.

    The best values are those with the lowest geometric mean of the errors over the kinds of held-out text, if it is
    lower than at the start: one may rise by a smaller factor than the other falls. A loss that is not finite ends the
    training.
    """
    target = {number: (lesson.targets[number], call.mask) for number, call in lesson.calls.items()}
    scale = 1 / max(sum(_squares(target, lesson.training)), TINY)
    energy = {kind: max(sum(_squares(target, numbers)), TINY) for kind, numbers in lesson.held_out.items()}
    leaves = {name: value.clone().requires_grad_() for name, value in student.values.items()}
    rate = _rate(student)
    adam = torch.optim.Adam([*leaves.values()], lr=rate)
    start = _errors(student, lesson, energy, leaves)
    best, kept, values, stopped, done = start, 0, None, "", 0
    order: list[int] = []
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        if not order:
            order = torch.randperm(len(lesson.training), generator=generator).tolist()
        for group in adam.param_groups:
            group["lr"] = rate * _schedule(step, steps)
        if not _take_step(student, lesson, lesson.training[order.pop()], leaves, adam, scale):
            stopped = "the loss is not finite"
            break
        done = step + 1
        last = done == steps
        over = not last and from_one(late)
        if done % max(1, steps // CHECKS) and not (last or over):
            continue
        errors = _errors(student, lesson, energy, leaves)
        if mean_error(errors) < mean_error(best):
            best, kept = errors, done
            values = {name: leaf.detach().clone() for name, leaf in student.rounded(leaves).items()}
        if over:
            stopped = "the time is over"
            break
    return Fitted(values, {kind: (start[kind], best[kind]) for kind in start}, kept, done, stopped)


def _take_step(
    student: Student,
    lesson: Lesson,
    number: int,
    leaves: dict[str, torch.Tensor],
    adam: torch.optim.Optimizer,
    scale: float,
) -> bool:
    """Take one step on one window. Returns False, and changes nothing, if the loss is not finite."""
    gradients = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    if number in lesson.calls:
        with torch.enable_grad():
            call = lesson.calls[number]
            error = student(number, call, leaves) - lesson.targets[number].to(student.device)
            mask = call.mask.reshape(error.shape[:-1]).to(error.device)
            loss = (error * mask[..., None]).square().sum() * scale * len(lesson.training)
            found = torch.autograd.grad(loss, [*leaves.values()], allow_unused=True)
        gradients = {n: gradients[n] if g is None else g for n, g in zip(leaves, found, strict=True)}
    finite = True
    for name, gradient in gradients.items():
        gradient = total(gradient.cpu()).to(gradient.device) if gradient.is_cuda else total(gradient)
        leaves[name].grad = gradient * student.masks[name] if name in student.masks else gradient
        finite &= bool(gradient.isfinite().all())
    if finite:
        adam.step()
    return finite


def _rate(student: Student) -> float:
    """Return the learning rate for what a student trains."""
    if not student.trained.wanted.of_state:
        return WIDE_RATE
    return RATE if student.trained.projection is None else PROJECTED_RATE


def _schedule(step: int, steps: int) -> float:
    """Return the factor of the learning rate: linear warm-up, then cosine decay."""
    return min((step + 1) / max(1, WARM_UP * steps), (1 + math.cos(math.pi * step / steps)) / 2)


@torch.no_grad()
def _errors(
    student: Student, lesson: Lesson, energy: Mapping[str, float], values: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """Return the relative squared error on each kind of held-out text, with values as they would be stored."""
    stored, found = student.rounded(values), {}
    for kind, numbers in lesson.held_out.items():
        errors = {}
        for number in (n for n in numbers if n in lesson.calls):
            call = lesson.calls[number]
            errors[number] = student(number, call, stored) - lesson.targets[number].to(student.device), call.mask
        found[kind] = sum(_squares(errors, numbers)) / energy[kind]
    return found


def _squares(values: Mapping[int, tuple[torch.Tensor, torch.Tensor]], numbers: Sequence[int]) -> list[float]:
    """Sum the squares of every window, from the process that holds it: (1, T, width) with their mask, by number.

    A shared expert has (T, width).

    Each is summed alone, so that totals are the same to the last bit for any number of processes.
    """
    sums = torch.zeros(len(numbers), dtype=torch.float64)
    for place, number in enumerate(numbers):
        if number in values:
            value, mask = values[number]
            sums[place] = value[mask.reshape(value.shape[:-1]).to(value.device)].double().square().sum()
    return [float(one) for one in total(sums)]


def mean_error(errors: Mapping[str, float]) -> float:
    """Return the geometric mean over kinds of text, in which one with small errors counts as much as any other."""
    return math.exp(sum(math.log(max(error, TINY)) for error in errors.values()) / len(errors))
