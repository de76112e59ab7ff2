"""Train the models that other parts need: of associative recall, and the reference models.

Recall (MQAR): a sequence holds PAIRS different keys, each followed by its value, and then the keys again in a random
order, each followed by its value once more. The loss is on these values alone. The number of pairs grows from 4, by 4
whenever nine in ten of the values are right; the learning rate is constant, and falls linearly to zero over the last
DECAY steps. Task: Arora et al., "Zoology", arXiv 2312.04927, without filler.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import Made, Subject, perplexity, progress, with_error
from torch import Tensor, nn

import sspruner
from sspruner.compute.device import resolve_device
from sspruner.evaluation.damage import mean_loss
from sspruner.evaluation.recall import FIRST_WORD, answers, recall, sequences, tasks_for
from sspruner.recipes.train import Settings
from sspruner.training.gradual import likelihood
from sspruner.training.loop import adamw, take_step, train
from sspruner.training.text import Text

WARM_UP, DECAY = 50, 0.5  # warm-up in steps; decay: a fraction of them
BATCH, FIRST_PAIRS, MORE_PAIRS, LEARNED = 64, 4, 4, 0.9
STEP, RATE = 0.5, 0.05  # dt and -A before training: learns sooner than with those of a language model
SIZE = {"family": "mamba2", "pairs": 24, "vocabulary": 128, "steps": 800, "seed": 0}
TEST_SEQUENCES, TEST_SEED = 512, 1_000_000
SCAN = "transformers.models.mamba.modeling_mamba.mamba_selective_scan"
# Settings of a part, too: on a GPU more sequences are trained on at once, checkpoints are rarer, and the time is lent.
LENGTH = {"batch": 8, "at_once": 8, "every": 100, "max_minutes": None}
FILES, WINDOWS = ("books-val.txt", "books-test.txt"), 320


@dataclass(frozen=True)
class Schedule(Settings):
    """Settings with the learning rate of this task."""

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 1."""
        return self.learning_rate * min(step / WARM_UP, 1, (1 - step / self.steps) / DECAY)


def recall_model(s: Any) -> Any:
    """Return a freshly initialised model for recall of `pairs`."""
    model = remembering(fresh_model(s.family, s.config, s.vocabulary, s.seed, token=None))
    model.config.recall_pairs = s.pairs
    return model


def remembering(model: Any) -> Any:
    """Let a model write much into its state and forget little of it; return it."""
    for module in model.modules():
        if hasattr(module, "A_log"):
            module.A_log.data.fill_(math.log(RATE))
            module.dt_bias.data.fill_(math.log(math.expm1(STEP)))
    return model


def objective(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss of the answers, and how many of them are right."""
    logits, target = answers(model(input_ids=tokens, use_cache=False).logits, tokens)
    right = (logits.argmax(-1) == target).float().mean()
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()), {"right": right}


def train_recall(model: Any, pairs: int, steps: int, seed: int, words: int = 0) -> None:
    """Train with AdamW on new sequences in every step, with more and more pairs. words: of some words alone."""
    sizes: dict[str, Any] = {"batch": BATCH, "at_once": BATCH, "seq_len": 1, "max_tokens": BATCH * steps}
    settings = Schedule(learning_rate=1e-2, weight_decay=0.1, **sizes)
    generator, optimizer = torch.Generator().manual_seed(seed), adamw(list(model.parameters()), settings)
    now, right, device = min(FIRST_PAIRS, pairs), 0.0, next(model.parameters()).device
    model.train()
    for step in range(1, steps + 1):
        tokens = sequences(BATCH, now, words or model.config.vocab_size, generator).to(device)
        tokens = tokens + FIRST_WORD if words else tokens
        metrics = take_step(model, tokens, optimizer, settings, step, objective)
        right = 0.9 * right + 0.1 * metrics["right"]
        if step % 50 == 0:
            progress(f"step {step}: {now} pairs, loss {metrics['loss']:.3f}, accuracy {right:.3f}")
        if right > LEARNED and now < pairs:
            now, right = min(now + MORE_PAIRS, pairs), 0.0
    if now < pairs:
        raise SystemExit(f"{steps} steps were enough for {now} pairs, not for {pairs}; give more steps")
    model.eval()


def tables(s: Any) -> Made:
    """Train and save a model of recall; return its accuracy. Settings: out, config, those of SIZE; device."""
    vars(s).update(SIZE | vars(s))
    model, start = on_its_device(recall_model(s), s), time.monotonic()
    train_recall(model, s.pairs, s.steps, s.seed)
    minutes = (time.monotonic() - start) / 60
    sspruner.save(model.cpu(), s.out, overwrite=True)
    accuracy = with_error(recall(model, tasks_for(model, TEST_SEQUENCES, TEST_SEED))[0])
    text = f"{s.out}: accuracy {accuracy}, trained in {minutes:.1f} minutes"
    return [text], f"seed {s.seed}, {TEST_SEED} (test sequences); {s.steps} steps of {BATCH} sequences"


def selective_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, **more: Any) -> Tensor:
    """Compute what transformers' Mamba does step by step, in fp32: (b, D, T), as x, dt and z; B and C (b, N, T).

    Its own loop indexes tensors of all steps, so that the gradient of every step is a tensor of all steps: too slow to
    train. Here the steps, which come first, are taken apart once.
    """
    dt = nn.functional.softplus(dt.float() + more["delta_bias"][:, None])
    x, dt, B, C = (v.float().permute(2, 0, 1) for v in (x, dt, B, C))  # (T, b, D) and (T, b, N)
    decay, enters = (dt[..., None] * A).exp(), (dt * x)[..., None] * B[:, :, None]  # (T, b, D, N)
    h, y = torch.zeros_like(enters[0]), []
    for a, u, c in zip(decay, enters, C, strict=True):
        h = a * h + u
        y.append((h @ c[..., None])[..., 0])
    return (torch.stack(y) + D * x).permute(1, 2, 0) * nn.functional.silu(z)


def fresh_model(family: str, config: dict[str, Any], vocabulary: int, seed: int, token: int | None = 0) -> Any:
    """Return a freshly initialised model of a family. token: that of padding, begin and end."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), token)
    made = AutoConfig.for_model(
        family, **config, **tokens, vocab_size=vocabulary, tie_word_embeddings=token is not None
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(made)
    for module in model.modules():
        if hasattr(module, "head_k_dim"):  # transformers leaves a delta net without memory; dt as in Mamba2
            dt = torch.exp(torch.empty_like(module.dt_bias).uniform_(math.log(1e-3), math.log(0.1)))
            module.dt_bias.data = dt + torch.log(-torch.expm1(-dt))
    return model


def on_its_device(model: Any, s: Any) -> Any:
    """Move a model to the device that a part's settings name (device=cuda), if they do, and return it."""
    return model.to(resolve_device(getattr(s, "device", "cpu")))


def settings_of(s: Any, **how: Any) -> Settings:
    """Return the settings of a training; those of LENGTH may be settings of the part. how: the others."""
    given = {name: getattr(s, name, value) for name, value in LENGTH.items()}
    return Settings(bf16=True, weight_decay=0.1, **given, **how)


def reference(s: Any) -> Made:
    """Train and save a reference model; return its facts. Settings: families, family, out, tokens, seed; LENGTH."""
    tokenizer, seed = sspruner.load()[1], getattr(s, "seed", 0)
    model = fresh_model(s.family, s.families[s.family], len(tokenizer), seed)
    progress(f"{s.family}: {sum(p.numel() for p in model.parameters()):,} parameters")
    text = Text((str(s.data / "books-train.txt"),), tokenizer, 256, seed=seed)
    settings = settings_of(s, max_tokens=s.tokens, learning_rate=3e-3, seed=seed)
    with tempfile.TemporaryDirectory() as folder, patch(SCAN, selective_scan):
        run = train(on_its_device(model, s), text, settings, likelihood, Path(folder))
    sspruner.save(model.cpu().to(torch.bfloat16), s.out, tokenizer, overwrite=True)
    facts: dict[str, Any] = {"tokens": run.tokens, "steps": run.steps, "minutes": round(run.seconds / 60, 1)}
    subject = Subject(s.out, s.data)
    for file in FILES:
        windows = subject.text(file, WINDOWS, first=True)
        facts[file] = round(perplexity([mean_loss(subject.model, windows.batches(8))]), 2)
    return [json.dumps(facts, indent=2)], f"seed {seed}"
