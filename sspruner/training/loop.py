"""Training loop of every method: blocks of text, steps of AdamW, checkpoints for exact resumption."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sspruner.compute.forward import check_predicts_tokens
from sspruner.compute.processes import rank, total, world
from sspruner.compute.quick import quick_on_cpu
from sspruner.errors import InputError
from sspruner.evaluation.windows import alone, logits_of, losses_by_batch
from sspruner.recipes.train import Settings
from sspruner.training import checkpoint
from sspruner.training.examples import Examples
from sspruner.training.log import Log, check_trackers, forget_after
from sspruner.training.text import Text

# (model, tokens (b, T)) -> the loss, and its parts by name; means over tokens
Objective = Callable[[nn.Module, torch.Tensor], tuple[torch.Tensor, dict[str, torch.Tensor]]]
Hook = Callable[[int], None]  # called with the number of the step that has just finished

#: What to do where a step goes wrong: a run's checkpoints are of its learning rate alone.
ANEW = "start again in another folder, with a lower learning rate"


@dataclass(frozen=True)
class Trained:
    """Record of a run. perplexity: of the held-out blocks, before the first step and at the end; None for examples.

    held_out_loss: the same of held-out examples, each of which counts as one token; None for text.
    """

    steps: int
    tokens: int
    seconds: float
    perplexity: tuple[float, float] | None
    finished: bool  # False if max_minutes stopped it
    held_out_loss: tuple[float, float] | None = None


def train(
    model: nn.Module,
    text: Text | Examples,
    settings: Settings,
    objective: Objective,
    folder: Path,
    *,
    after_step: Hook | None = None,
    memory: dict[str, torch.Tensor] | None = None,
    progress: Callable[[dict[str, float], int, int], None] | None = None,
) -> Trained:
    """Train the parameters of `model` that require gradients, in place, in fp32.

    objective: the loss of a batch. after_step: called after each step; may change weights, e.g. apply masks.
    memory: the method's own tensors, by name; saved in checkpoints, and restored in place.
    folder: for checkpoints and metrics.jsonl; an interrupted run continues from there with the same result.
    progress: called with the metrics of a step, its number, and the number of steps.

    Raises InputError if the loss or its gradient is not finite, or if a checkpoint cannot be written; the last good
    checkpoint stays.
    """
    if isinstance(text, Text):
        check_predicts_tokens(model, "train")
    check_trackers(settings.log_with)
    if settings.batch % world():
        raise InputError(f"batch {settings.batch}: must be a multiple of the number of processes, {world()}")
    memory = memory or {}
    device = next(model.parameters()).device
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(parameters, settings)
    wrapped = DistributedDataParallel(model) if world() > 1 else model
    held_out = text.held_out_blocks()  # (blocks, T)
    torch.manual_seed(settings.seed)
    model.train()
    if settings.recompute:
        recompute(model, "enable")
    checkpoints, metrics_file = folder / "checkpoints", folder / "metrics.jsonl"
    resumed = checkpoint.load(checkpoints, model, optimizer, _state(0, 0.0, math.nan) | memory)
    step, before, first = (
        (int(resumed["step"]), float(resumed["seconds"]), float(resumed["first"])) if resumed else (0, 0.0, 0.0)
    )
    if resumed:
        torch.set_rng_state(resumed["rng"])
    forget_after(metrics_file, step if resumed else -1)
    with quick_on_cpu(model, device), Log(metrics_file, settings.log_with) as log:
        if not resumed:
            first = last = measured(model, text, held_out, settings.at_once)
            log.write(0, **{text.measure: first})
        blocks = text.training_blocks(skip=step * settings.batch)
        begun = time.monotonic() - before
        while step < settings.steps and not over(begun, settings.max_minutes, device):
            step, now = step + 1, time.monotonic()
            metrics = take_step(wrapped, share(blocks, settings).to(device), optimizer, settings, step, objective)
            if after_step:
                after_step(step)
            seconds = note_step(log, metrics, step, settings, now, begun, progress)
            if step % settings.every == 0 and step < settings.steps:
                log.write(step, **{text.measure: measured(model, text, held_out, settings.at_once)})
                checkpoint.save(checkpoints, step, model, optimizer, _state(step, seconds, first) | memory)
        last = measured(model, text, held_out, settings.at_once)
        if step > (int(resumed["step"]) if resumed else 0):
            log.write(step, **{text.measure: last})
            checkpoint.save(checkpoints, step, model, optimizer, _state(step, time.monotonic() - begun, first) | memory)
    model.eval()
    if settings.recompute:
        recompute(model, "disable")
    tokens = step * settings.batch * settings.seq_len
    found = {"held_out_loss": (first, last)} if isinstance(text, Examples) else {}
    perplexities = None if found else (first, last)
    return Trained(step, tokens, time.monotonic() - begun, perplexities, step == settings.steps, **found)


def gradients_on(model: nn.Module) -> None:
    """Let all parameters of a model have gradients, if none has: so do the functions that train return theirs."""
    if not any(p.requires_grad for p in model.parameters()):
        model.requires_grad_(True)


def recompute(model: nn.Module, what: str) -> None:
    """Enable or disable gradient checkpointing in transformers, whose method had another name before."""
    for name in (f"activation_checkpointing_{what}", f"gradient_checkpointing_{what}"):
        if switch := getattr(model, name, None):
            switch()
            return
    raise InputError(f"recompute: {type(model).__name__} cannot")


def note_step(
    log: Log,
    metrics: dict[str, float],
    step: int,
    settings: Settings,
    now: float,
    begun: float,
    progress: Callable[[dict[str, float], int, int], None] | None,
) -> float:
    """Log a step that began at `now`, of a run that began at `begun`. Return the seconds of the run."""
    seconds, per_step = time.monotonic() - begun, settings.batch * settings.seq_len
    metrics |= {"tokens_per_second": per_step / (time.monotonic() - now), "seconds": seconds}
    log.write(step, tokens=step * per_step, learning_rate=settings.rate(step), **metrics)
    if progress:
        progress(metrics, step, settings.steps)
    return seconds


def share(blocks: Iterator[torch.Tensor], settings: Settings) -> torch.Tensor:
    """Return this process's part of the next batch: int64 (batch / processes, T)."""
    return torch.stack(list(islice(blocks, settings.batch)))[rank() :: world()]


def adamw(parameters: list[nn.Parameter], settings: Settings) -> torch.optim.AdamW:
    """Create the optimizer of every method; its rate is set at each step.

    Weight decay for matrices, none for vectors.
    """
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))


def take_step(
    model: Any,
    tokens: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    step: int,
    objective: Objective,
) -> dict[str, float]:
    """Take one step of AdamW on this process's part of the batch, (b, T). Return means over all processes.

    Raises InputError, in every process, if a loss or its gradient is not finite.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = settings.rate(step)
    optimizer.zero_grad(set_to_none=True)
    means: dict[str, torch.Tensor] = {}
    pieces = torch.split(tokens, settings.at_once)
    for piece in pieces:
        share = len(piece) / len(tokens)
        waits = isinstance(model, DistributedDataParallel) and piece is not pieces[-1]
        with model.no_sync() if waits else nullcontext():
            with torch.autocast(tokens.device.type, torch.bfloat16, enabled=settings.bf16):
                loss, parts = objective(model, piece)
            torch.autograd.backward(share * loss)
        for name, value in {"loss": loss, **parts}.items():
            means[name] = means.get(name, 0) + share * value.detach().float()
    means["gradient_norm"] = nn.utils.clip_grad_norm_(parameters, settings.clip)
    metrics = dict(zip(means, (total(torch.stack([*means.values()])) / world()).tolist(), strict=True))
    if not all(map(math.isfinite, metrics.values())):
        raise InputError(
            f"step {step}: the loss is {metrics['loss']:g}, the norm of its gradient {metrics['gradient_norm']:g}; "
            f"{ANEW}"
        )
    optimizer.step()
    return metrics


@torch.no_grad()
def measured(model: nn.Module, text: Text | Examples, held_out: torch.Tensor, at_once: int) -> float:
    """Return the perplexity of held-out blocks of text, or the mean loss of held-out examples."""
    if isinstance(text, Text):
        return perplexity(model, held_out, at_once)
    device, training, total_loss = next(model.parameters()).device, model.training, 0.0
    model.eval()
    for piece in torch.split(held_out, at_once):
        total_loss += len(piece) * float(text.objective(model, piece.to(device))[0])
    model.train(training)
    return total_loss / len(held_out)


@torch.no_grad()
def perplexity(model: nn.Module, blocks: torch.Tensor, at_once: int) -> float:
    """Return the perplexity of blocks, int64 (n, T), each scored separately; its first token is context only."""
    nll = count = 0.0
    windows = (alone(tokens, torch.ones_like(tokens, dtype=torch.bool)) for tokens in torch.split(blocks, at_once))
    for _, (batch,) in losses_by_batch(windows, [logits_of(model)]):
        nll, count = nll + float(batch.nll.sum()), count + float(batch.tokens.sum())
    return math.exp(min(nll / count, 700.0))


def over(begun: float, max_minutes: float | None, device: torch.device) -> bool:
    """Check whether time is up. All processes agree: one that stopped first would leave the others waiting."""
    if max_minutes is None:
        return False
    late = torch.tensor(float(time.monotonic() - begun > 60 * max_minutes), device=device)
    return bool(total(late) > 0)


def _state(step: int, seconds: float, first: float) -> dict[str, torch.Tensor]:
    """Return a checkpoint's content besides weights and optimizer. first: perplexity before the first step."""
    state = {name: torch.tensor(value, dtype=torch.float64) for name, value in (("seconds", seconds), ("first", first))}
    return state | {"step": torch.tensor(step), "rng": torch.get_rng_state()}
