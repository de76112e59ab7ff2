"""vLLM's plugin: a balanced Mamba2 decodes in vLLM as it does in sspruner.load, with a cache of its smaller state."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sspruner
from support.engines import needs, run
from support.tiny import tiny_model, tokens

pytestmark = [needs("vllm"), pytest.mark.slow]

PROMPTS = [[5, 17, 3], [9, 2, 11, 4, 23], [1]]
STEPS = 24
CLOSE = 1e-4  # of log-probabilities: two implementations of one model in fp32


def balanced(model: nn.Module, **options: Any) -> nn.Module:
    sspruner.prune(model, "balanced", calibration=tokens(8, 48), **options)
    return model


def reference() -> nn.Module:
    return sspruner.load(dtype="float32")[0]


def six_heads() -> nn.Module:
    """Heads first: the norm has an epsilon of its own then."""
    model = reference()
    sspruner.prune(model, "magnitude", axis="head", keep=6)
    return balanced(model, keep=16)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "13 of 128": lambda: balanced(reference(), keep=13),
    "another k in each layer": lambda: balanced(reference(), sparsity=0.85, allocation="global"),
    "two groups": lambda: balanced(tiny_model(groups=2, state=6, layers=3), keep=2),
    "six heads": six_heads,
}


@dataclass
class Served:
    """A model, and what vLLM answered of its folder."""

    model: nn.Module
    answer: dict[str, Any]


def served(models: dict[str, nn.Module], home: Path, **engine: Any) -> dict[str, Served]:
    """Decode every model in one process of vLLM, which finds the plugin by its entry point."""
    requests = []
    for number, model in enumerate(models.values()):
        folder = sspruner.export(model, home / str(number), to="hf-remote")
        requests.append({"folder": str(folder), "prompts": PROMPTS, "tokens": STEPS, "engine": engine})
    (home / "requests.json").write_text(json.dumps(requests))
    run("vllm", "vllm_run.py", str(home / "requests.json"), str(home / "answers.json"))
    answers = json.loads((home / "answers.json").read_text())
    return {name: Served(models[name], answer) for name, answer in zip(models, answers, strict=True)}


@pytest.fixture(scope="module")
def decoded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Served]:
    return served({name: make() for name, make in MODELS.items()}, tmp_path_factory.mktemp("vllm"))


@torch.no_grad()
def greedy(model: nn.Module, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Return the likeliest token at each step and its log-probability, by whole forwards without a cache."""
    ids, chosen, likely = list(prompt), [], []
    for _ in range(STEPS):
        best = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1).max(-1)
        ids.append(int(best.indices))
        chosen.append(int(best.indices))
        likely.append(float(best.values))
    return chosen, likely


@pytest.mark.parametrize("name", MODELS)
def test_vllm_decodes_what_sspruner_does(name: str, decoded: dict[str, Served]) -> None:
    """Three sequences in one batch; the remote code beside the weights is not trusted, and not needed."""
    one = decoded[name]
    assert "error" not in one.answer, one.answer
    for prompt, answer in zip(PROMPTS, one.answer["answers"], strict=True):
        chosen, likely = greedy(one.model, prompt)
        assert answer["tokens"] == chosen
        theirs = [step[str(token)] for step, token in zip(answer["likely"], chosen, strict=True)]
        assert theirs == pytest.approx(likely, abs=CLOSE)


def test_heads_that_differ_by_layer_are_refused(tmp_path: Path) -> None:
    model = reference()
    sspruner.prune(model, "magnitude", axis="head", allocation="global", sparsity=0.3)
    answer = served({"uneven": balanced(model, keep=16)}, tmp_path)["uneven"].answer
    assert "differs by layer; vLLM builds all layers in one size" in answer["error"]
