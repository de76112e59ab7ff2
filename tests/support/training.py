"""Training text, options and logs of tiny training runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sspruner.training.loop import Settings
from sspruner.training.text import Text
from support.letters import Letters
from support.training_text import sources

SMALL = Settings(max_tokens=6 * 4 * 8, batch=4, at_once=4, seq_len=8, learning_rate=1e-2, every=2)


class Stopped(Exception):
    """Error raised in the middle of a run."""


def likelihood(model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the plain loss of a language model."""
    found = model(input_ids=batch, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(found.flatten(0, 1), batch[:, 1:].flatten()), {}


def text(folder: Path, held_out: int = 2) -> Text:
    return Text(sources(folder), Letters(), 8, held_out)


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    clock = ("seconds", "tokens_per_second")
    return [{name: value for name, value in json.loads(line).items() if name not in clock} for line in lines]


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
