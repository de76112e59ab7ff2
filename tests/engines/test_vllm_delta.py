"""vLLM on a CPU with gated delta nets: random Qwen3-Next models in bf16, the only dtype of its operation for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sspruner
from sspruner.formats.fitting import Subject, unfit
from sspruner.formats.targets import target
from support.engines import needs, run
from support.zoo import zoo

pytestmark = [needs("vllm"), pytest.mark.slow]

TOKENS = 8
PROMPTS = [[5, 17, 200, 33, 41, 7, 99, 300], [1, 2, 3, 4, 5], [400, 300, 200, 100, 50, 25]]
BF16, FP32 = {"dtype": "bfloat16"}, {"dtype": "float32"}
RUNS = {"64 channels": {"state": 64, "channels": 64}, "128 channels": {"state": 128, "channels": 128}}
FAILS: dict[str, tuple[dict[str, int], dict[str, str], str]] = {
    "96 channels": ({"state": 96, "channels": 96}, BF16, "Unexpected head dim size, 96"),
    "fewer key channels": ({"state": 64, "channels": 128}, BF16, "expect head_dim to be equal to head_dim_v"),
    "fp32": ({"state": 64, "channels": 64}, FP32, "CPU GDN attention requires BF16"),
}


def model(**sizes: int) -> Any:
    wide = {"hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    made = zoo("qwen3_next", bias=False, experts=8, vocab_size=512, rope_parameters=rope, **wide, **sizes)
    return made.bfloat16()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Name -> the model, and what vLLM answered."""
    home, requests, models = tmp_path_factory.mktemp("vllm"), [], {}
    for name, (sizes, engine, _) in ({n: (sizes, BF16, "") for n, sizes in RUNS.items()} | FAILS).items():
        models[name] = model(**sizes)
        folder = sspruner.export(models[name], home / str(len(requests)), to="hf")
        requests.append({"folder": str(folder), "prompts": PROMPTS, "tokens": TOKENS, "engine": engine})
    asked, answers = home / "requests.json", home / "answers.json"
    asked.write_text(json.dumps(requests))
    run("vllm", "vllm_run.py", str(asked), str(answers))
    found = json.loads(Path(answers).read_text())
    return {name: (made, answer) for (name, made), answer in zip(models.items(), found, strict=True)}


@torch.no_grad()
@pytest.mark.parametrize("name", RUNS)
def test_it_runs(name: str, served: Any) -> None:
    """About what transformers computes in bf16: in random models roundings grow, so that only most tokens agree."""
    made, answer = served[name]
    agree, differences = 0, []
    for prompt, found in zip(PROMPTS, answer["answers"], strict=True):
        logits = made(torch.tensor([prompt + found["tokens"]]), use_cache=False).logits[0].float()
        steps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        agree += int((steps.argmax(-1) == torch.tensor(found["tokens"])).sum())
        for step, likely in zip(steps, found["likely"], strict=True):
            differences += [abs(float(step[int(token)]) - p) for token, p in likely.items()]
    assert agree >= 0.6 * TOKENS * len(PROMPTS)
    assert sum(differences) / len(differences) < 0.3
    assert not unfit(Subject.of(made), target("vllm:cpu"))


@pytest.mark.parametrize("name", FAILS)
def test_what_fails_is_refused_or_said(name: str, served: Any) -> None:
    made, answer = served[name]
    assert FAILS[name][2] in answer["error"]
    cpu = target("vllm:cpu")
    if FAILS[name][1] is FP32:  # an option of the engine, not the model
        assert any("in bf16 alone" in note for note in cpu.notes(sspruner.trace(made), made.config))
    else:
        assert "key channels of a head" in unfit(Subject.of(made), cpu)
