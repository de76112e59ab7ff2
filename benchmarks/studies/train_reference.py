"""Train a small model of one family on a text file, as a Hugging Face folder with a measured perplexity.

The tokenizer is the reference model's. This made the reference models beside `mamba2-books-4m`, with another loop and
for a number of minutes: their cards say with which budget.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import Made, Subject, progress
from torch import Tensor, nn

import sspruner
from sspruner.evaluation.damage import mean_loss
from sspruner.recipes.train import Settings
from sspruner.training.gradual import likelihood
from sspruner.training.loop import train
from sspruner.training.text import Text

SCAN = "transformers.models.mamba.modeling_mamba.mamba_selective_scan"
FILES, WINDOWS = ("books-val.txt", "books-test.txt"), 320


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


def new_model(family: str, config: dict[str, Any], vocabulary: int, seed: int) -> Any:
    """Return a freshly initialised model of a family."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    made = AutoConfig.for_model(family, **config, **tokens, vocab_size=vocabulary, tie_word_embeddings=True)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(made)


def tables(s: Any) -> Made:
    """Train and save a model; return its facts. Settings: families, family, out, tokens, seed."""
    tokenizer, seed = sspruner.load()[1], getattr(s, "seed", 0)
    model = new_model(s.family, s.families[s.family], len(tokenizer), seed)
    progress(f"{s.family}: {sum(p.numel() for p in model.parameters()):,} parameters")
    text = Text((str(s.data / "books-train.txt"),), tokenizer, 256, seed=seed)
    how: dict[str, Any] = {"batch": 8, "at_once": 8, "bf16": True, "seed": seed, "weight_decay": 0.1}
    settings = Settings(max_tokens=s.tokens, learning_rate=3e-3, **how)
    with patch(SCAN, selective_scan):
        run = train(model, text, settings, likelihood, Path(f"{s.out}-run"))
    sspruner.save(model.to(torch.bfloat16), s.out, tokenizer, overwrite=True)
    facts: dict[str, Any] = {"tokens": run.tokens, "steps": run.steps, "minutes": round(run.seconds / 60, 1)}
    subject = Subject(s.out, s.data)
    for file in FILES:
        windows = subject.text(file, WINDOWS, first=True)
        facts[file] = round(float(torch.tensor(mean_loss(subject.model, windows.batches(8))).exp()), 2)
    return [json.dumps(facts, indent=2)], f"seed {seed}"
