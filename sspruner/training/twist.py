"""TwIST: each worker trains a random sub-network; they are averaged and drawn again; any one can be kept at the end.

Every `every` steps each worker gets a sub-network: units are dealt to the workers in turn, so that each unit is
trained, then every worker is filled up with random ones. It trains that smaller dense model on its own part of the
batches, and pushes it back: weights and AdamW moments become means over the workers that had them. At the end
sub-networks are drawn at random, without calibration. Source: Menezes et al., arXiv 2511.03983; here on the axes of the
graph instead of attention heads and FFN blocks.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import nn

from sspruner.axes import ELEMENT_AXES
from sspruner.budgets.budget import protected
from sspruner.budgets.decide import plan
from sspruner.compute.device import check_whole
from sspruner.compute.forward import check_predicts_tokens
from sspruner.compute.processes import rank, total, world
from sspruner.compute.quick import quick_on_cpu
from sspruner.errors import InputError
from sspruner.graph.fingerprint import fingerprint
from sspruner.graph.site import within
from sspruner.graph.trace import trace
from sspruner.plans.plan import Plan
from sspruner.recipes.train import Settings, TwistRecipe
from sspruner.scoring.scores import Scores
from sspruner.training import checkpoint
from sspruner.training.arguments import recipe_of
from sspruner.training.gradual import likelihood
from sspruner.training.log import Log, check_trackers, forget_after
from sspruner.training.loop import (
    Trained,
    adamw,
    gradients_on,
    note_step,
    over,
    perplexity,
    recompute,
    share,
    take_step,
)
from sspruner.training.run import run_folder
from sspruner.training.shards import Shards
from sspruner.training.subnet import Subnets
from sspruner.training.text import Text


@dataclass(frozen=True)
class Draws:
    """Random sub-networks of the trained model, and the perplexity of each on the held-out blocks.

    before: perplexity of the same sub-networks before training. bytes_per_round: mean over rounds, by all processes.
    """

    plans: tuple[Plan, ...]
    perplexities: tuple[float, ...]
    before: tuple[float, ...]
    bytes_per_round: float

    def to_json(self) -> dict[str, Any]:
        """Return a dict of JSON values, without the plans."""
        numbers = {"mean": self.mean, "std": self.std, "best": self.best, "bytes_per_round": self.bytes_per_round}
        return {"draws": {"perplexity": [*self.perplexities], "before": [*self.before], **numbers}}

    @property
    def best(self) -> int:
        """Return the index of the draw with the lowest perplexity."""
        return min(range(len(self.plans)), key=self.perplexities.__getitem__)

    @property
    def mean(self) -> float:
        """Return the mean of the perplexities."""
        return fmean(self.perplexities)

    @property
    def std(self) -> float:
        """Return the standard deviation of the perplexities over draws; 0 for a single one."""
        return stdev(self.perplexities) if len(self.perplexities) > 1 else 0.0


def twist(
    model: nn.Module,
    text: Text,
    out: str | Path,
    recipe: TwistRecipe | None = None,
    *,
    progress: Callable[[dict[str, float], int, int], None] | None = None,
    **short: Any,
) -> tuple[nn.Module, Draws, Trained]:
    """Train a model so that random sub-networks of it are good models. Return the whole model, draws, and the record.

    There is one worker for each process started by torchrun; `settings.batch` is the batch of all together. The
    perplexities of the record are means over the draws.

    Args:
        text: the training text, instead of the recipe's.
        out: the folder of the run (docs/train.md).
        recipe: a `TwistRecipe`; or its fields as `short` arguments: `twist(..., axis="head", keep=0.5)`, or `settings`,
            a `Settings`. `every` is `deal_every`.
        progress: called with the metrics of a step, its number, and the number of steps.

    Raises:
        InputError: for invalid arguments, and if the workers cannot hold every unit, or outnumber the units. After an
            error in a round the model is empty, for its weights are spread over the processes: load it again.
    """
    check_whole(model, "training")
    recipe = recipe_of(TwistRecipe, recipe, text, short, {"every": "deal_every"})
    check_predicts_tokens(model, "train")
    gradients_on(model)
    settings, method = recipe.settings, recipe.method
    if settings.batch % world():
        raise InputError(f"batch {settings.batch}: must be a multiple of the number of processes, {world()}")
    deal = Deal(model, list(method.axis), method.keep, method.ends, settings.seed)
    deal.check(world())
    held_out = text.held_out_blocks()  # (blocks, T)
    run_settings: dict[str, Any] = {
        "method": "twist",
        "model": fingerprint(model),
        "axis": deal.axes,
        "keep": method.keep,
    }
    run_settings |= {"deal_every": method.deal_every, "ends": method.ends, "draws": method.draws}
    folder = run_folder(out, run_settings | settings.identity() | text.identity(), recipe)
    dtypes, device = {name: p.dtype for name, p in model.named_parameters()}, next(model.parameters()).device
    plans = [deal.draw(f"draw {number}", 1)[0] for number in range(method.draws)]
    subnets, shards = Subnets(model, plans[0]), Shards(model.named_parameters(), device)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data = torch.empty(0, device=device)  # the shards hold the weights, split among processes
    run = _Run(subnets, shards, deal, method.deal_every, text, held_out, settings, folder, progress)
    trained, drawn = run.train(plans, device)
    for name, parameter in model.named_parameters():
        parameter.data = shards.weights(name).view(shapes[name]).to(dtypes[name])
    made_for = {"fingerprint": fingerprint(model)}  # of the trained model
    drawn = replace(drawn, plans=tuple(replace(plan, model=made_for) for plan in plans))
    return model.requires_grad_(False).eval(), drawn, trained


class Deal:
    """Rule for drawing sub-networks: axes, fraction kept of each group, in all blocks but some at both ends."""

    def __init__(self, model: nn.Module, axes: list[str], keep: float, ends: int, seed: int) -> None:
        """Prepare the groups to deal. Raises InputError if there are none."""
        self.graph, self.axes, self.keep, self.seed = trace(model), axes, keep, seed
        if elements := [axis for axis in axes if axis in ELEMENT_AXES]:
            raise InputError(f"axis {elements[0]!r}: of single elements; twist deals {', '.join(self.graph.axes)}")
        self.groups = {name: group for axis in axes for name, group in self.graph.on_axis(axis).items()}
        count = len(model.get_submodule(self.graph.blocks)) if self.graph.blocks else 0  # type: ignore[arg-type]
        excluded = [f"{self.graph.blocks}.{i}" for i in {*range(ends), *range(count - ends, count)}]
        places = {block.path: block.path for group in self.groups.values() for block in group.blocks}
        places |= {group.layer: name for name, group in self.groups.items() if not group.blocks}
        self.ignore = [name for path, name in places.items() if any(within(path, end) for end in excluded)]
        if len(self.ignore) == len(places):
            raise InputError(f"ends {ends}: none of the {count} blocks is between them; spare fewer")

    def draw(self, key: str, workers: int) -> list[Plan]:
        """Return each worker's plan: each unit is dealt to one worker, the rest is random.

        Depends on seed and key only.
        """
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed} {key}").getrandbits(63))
        hands: list[dict[str, torch.Tensor]] = [{} for _ in range(workers)]
        for name, group in self.groups.items():
            alike = group.gain is not None  # the same units in every set, for which the shared factors stay theirs
            units = torch.rand(1 if alike else group.groups, group.units, generator=generator)
            units[:, protected(group, self.ignore)] = 2  # every worker keeps them: they are dealt last
            first = int(torch.randint(workers, (), generator=generator))
            holder = (first + units.argsort(-1).argsort(-1)) % workers  # (sets, units): in turn
            for worker, hand in enumerate(hands):
                dealt = torch.rand(units.shape, generator=generator) + (holder == worker)
                hand[name] = dealt.expand(group.groups, -1)
        sparsity = dict.fromkeys(self.axes, 1 - self.keep)
        return [plan(self.graph, Scores(hand), sparsity=sparsity, ignore=self.ignore) for hand in hands]

    def check(self, workers: int) -> None:
        """Raise InputError if the workers cannot hold every unit between them, or outnumber the units."""
        for name, reduction in self.draw("check", 1)[0].groups.items():
            always = len(protected(self.groups[name], self.ignore))
            n, q = reduction.before - always, reduction.after - always
            if workers > n:
                raise InputError(f"{workers} workers for {n} units of {name}: m <= n does not hold; start fewer")
            if workers * q < n:
                raise InputError(
                    f"{workers} workers with {q} of {n} units of {name} each: m q >= n does not hold, "
                    f"{workers * q} < {n}; start more with torchrun --nproc-per-node, or raise --keep"
                )


@dataclass(frozen=True)
class _Run:
    """The parts of one run, and its training loop."""

    subnets: Subnets
    shards: Shards
    deal: Deal
    every: int
    text: Text
    held_out: torch.Tensor
    settings: Settings
    folder: Path
    progress: Callable[[dict[str, float], int, int], None] | None

    def train(self, plans: list[Plan], device: torch.device) -> tuple[Trained, Draws]:
        """Train in rounds; an interrupted run continues from the end of one. plans: of the draws at the end."""
        check_trackers(self.settings.log_with)
        settings, checkpoints, metrics_file = self.settings, self.folder / "checkpoints", self.folder / "metrics.jsonl"
        numbers = torch.zeros(3 + len(plans), dtype=torch.float64)  # step, seconds, bytes, perplexities before
        state = {"shards": {name: self.shards.sharded(name) for name in self.shards.parts}, "numbers": numbers}
        resumed = checkpoint.read(checkpoints, state)
        if not resumed:
            numbers[3:] = torch.tensor(self.perplexities(plans, device))
        step, before = int(numbers[0]), float(numbers[1])
        forget_after(metrics_file, step if resumed else -1)
        begun, saved = time.monotonic() - before, step
        blocks = self.text.training_blocks(skip=step * settings.batch)
        with Log(metrics_file, settings.log_with) as log:
            if not resumed:
                log.write(0, held_out_perplexity=fmean(numbers[3:].tolist()))
            while step < settings.steps and not over(begun, settings.max_minutes, device):
                sent = self.shards.bytes_sent
                worker, step = self.round(step, blocks, device, log, begun)
                numbers[2] += float(total(torch.tensor(float(self.shards.bytes_sent - sent), device=device)))
                if step // settings.every > saved // settings.every or step == settings.steps:
                    ours = perplexity(worker, self.held_out.to(device), settings.at_once)
                    log.write(step, held_out_perplexity=float(total(torch.tensor(ours, device=device))) / world())
                    numbers[0], numbers[1], saved = step, time.monotonic() - begun, step
                    checkpoint.write(checkpoints, step, state)
            if step > saved:
                numbers[0], numbers[1] = step, time.monotonic() - begun
                checkpoint.write(checkpoints, step, state)
        tokens, first = step * settings.batch * settings.seq_len, numbers[3:].tolist()
        after = self.perplexities(plans, device)
        span = time.monotonic() - begun
        trained = Trained(step, tokens, span, (fmean(first), fmean(after)), step == settings.steps)
        return trained, Draws(
            tuple(plans), tuple(after), tuple(first), float(numbers[2]) / max(1, math.ceil(step / self.every))
        )

    def round(self, step: int, blocks: Any, device: torch.device, log: Log, begun: float) -> tuple[nn.Module, int]:
        """Train one deal to its end, or until time is up; then a later run continues with the same deal.

        Return this process's sub-network as it was pushed back, and the step.
        """
        number = step // self.every
        last = min((number + 1) * self.every, self.settings.steps)
        torch.manual_seed(random.Random(f"{self.settings.seed} {number} {rank()}").getrandbits(63))
        hands = self.deal.draw(f"round {number}", world())
        routes = self.shards.routes([self.subnets.places(hand) for hand in hands])
        pulled = self.shards.pull(routes)
        model, parameters = self.subnets.make(hands[rank()], {name: rows[:, 0] for name, rows in pulled.items()})
        model.train()
        if self.settings.recompute:
            recompute(model, "enable")
        optimizer = adamw([*parameters.values()], self.settings)
        for name, parameter in parameters.items():
            first, second = (pulled[name][:, kind].reshape(parameter.shape).clone() for kind in (1, 2))
            optimizer.state[parameter] = {"step": torch.tensor(float(step)), "exp_avg": first, "exp_avg_sq": second}
        with quick_on_cpu(model, device):
            while step < last and not over(begun, self.settings.max_minutes, device):
                step, now = step + 1, time.monotonic()
                batch = share(blocks, self.settings).to(device)
                metrics = take_step(model, batch, optimizer, self.settings, step, likelihood)
                note_step(log, metrics, step, self.settings, now, begun, self.progress)
        for name, parameter in parameters.items():
            moments = optimizer.state[parameter]
            rows = (self.subnets.weights(name, parameter), moments["exp_avg"], moments["exp_avg_sq"])
            torch.stack([row.flatten() for row in rows], 1, out=pulled[name])  # (its elements, 3)
        self.shards.push(routes, pulled)
        return model, step

    @torch.no_grad()
    def perplexities(self, plans: list[Plan], device: torch.device) -> list[float]:
        """Return the held-out perplexity of each drawn sub-network of the present model; processes share the work."""
        results = torch.zeros(len(plans), dtype=torch.float64, device=device)
        whole = {name: self.shards.weights(name) for name in self.shards.parts}
        for number in range(rank(), len(plans), world()):
            places = self.subnets.places(plans[number])
            model, _ = self.subnets.make(plans[number], {n: places(n).of(w) for n, w in whole.items()})
            with quick_on_cpu(model, device):
                results[number] = perplexity(model, self.held_out.to(device), self.settings.at_once)
        values: list[float] = total(results).tolist()
        return values
