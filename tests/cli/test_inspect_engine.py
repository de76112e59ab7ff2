"""`sspruner inspect --pool`: the numbers of the formulas, in JSON and as tables; engines beside targets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import sspruner
from sspruner.benchmarking.cache_layers import cache_layers
from sspruner.benchmarking.vllm_cache import VllmCache
from sspruner.formats import targets
from sspruner.formats.targets import names
from sspruner.io.skeleton import skeleton
from sspruner.recipes.serving import EngineOptions
from support.command import done, refused, saved_model, saved_zoo
from support.footprints import config_alone
from support.published import CONFIGS
from support.tiny import half

POOL = ("--pool", "1MiB", "--context", "1k,2k")


def test_before_and_after_a_plan(tmp_path: Path) -> None:
    folder = saved_zoo(tmp_path / "m", "bamba", state=16)
    model = skeleton(folder)
    graph = sspruner.trace(model)
    plan = half(graph, "state")
    plan.save(tmp_path / "plan.json")
    asked = ("inspect", folder, "--target", "vllm", *POOL, "--plan", tmp_path / "plan.json", "--prefix-caching")
    data = json.loads(done(*asked, "--json", "-").stdout)["engine"]
    options = EngineOptions(prefix_caching=True)
    assert (data["name"], data["pool_bytes"], data["options"]["prefix_caching"]) == ("vllm", 2**20, True)
    both = VllmCache(cache_layers(model, graph), options), VllmCache(cache_layers(model, graph, plan), options)
    for name, cache in zip(("model", "with_plan"), both, strict=True):
        found = data[name]
        assert (found["page_bytes"], found["block_tokens"]) == (cache.page, cache.block)
        assert [at["context"] for at in found["contexts"]] == [1024, 2048]
        assert [at["sequences"] for at in found["contexts"]] == [cache.sequences(2**20, c) for c in (1024, 2048)]
        assert [row["block_size"] for row in found["block_sizes"]] == [16, 32, 64, 128, 256]
        assert found["block_sizes"][0]["sequences"] == [at["sequences"] for at in found["contexts"]]
    shown = done(*asked).stdout
    for text in (
        "memory as vllm counts it, 1.05 MB for caches",
        "1,024 tokens: sequences",
        "with another --block-size",
    ):
        assert text in shown
    for cache in both:
        assert f"{cache.page:,} B" in shown
        assert f"{cache.concurrency(2**20, 2048):,.2f}x" in shown


@pytest.mark.parametrize(("engine", "says"), [("sglang", "balanced --mamba-full"), ("llama.cpp", "recurrent (S)")])
def test_other_engines(engine: str, says: str, tmp_path: Path) -> None:
    """An engine that is no target for sizes is one for memory."""
    folder = saved_zoo(tmp_path / "m", "bamba", tokenizer=False)
    shown = done("inspect", folder, "--target", engine, *POOL).stdout
    assert f"memory as {engine} counts it" in shown
    assert says in shown
    assert ("what each target takes" in shown) == (engine in names())


def test_without_attention_there_are_no_other_blocks(tmp_path: Path) -> None:
    shown = done(
        "inspect", saved_model(tmp_path / "m", tokenizer=False, vocabulary=31), "--target", "vllm", *POOL
    ).stdout
    assert "with another --block-size" not in shown
    assert "attention block" not in shown


@pytest.mark.slow
def test_a_published_model_in_bf16(tmp_path: Path) -> None:
    """Nemotron-H-8B: its state is fp32 in vLLM, that of Mamba2-1.3B bf16: half of what transformers keeps."""
    for name, dtype, state in (("Nemotron-H-8B", "float32", 4), ("Mamba2-1.3B", "bfloat16", 2)):
        folder = config_alone(tmp_path / name, CONFIGS[name])
        data = json.loads(done("inspect", folder, "--target", "vllm", "--pool", "40GiB", "--json", "-").stdout)
        found, layer = data["engine"]["model"], data["layers"][0]
        assert found["state_dtype"] == dtype
        conv = found["page_bytes"] - layer["state_bytes"] * state // 4
        assert conv == 3 * 2 * (8192 + 2048 if name.startswith("Nemotron") else 4096 + 256)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--pool 1GiB", "--pool: is the memory of an engine's caches: add --target vllm or sglang or llama.cpp"),
        ("--pool 1GiB --target hf", "add --target vllm or sglang"),
        ("--pool much --target vllm", "--pool 'much': expected a size"),
        ("--target vllm --spec 2", "--spec: decides the memory of an engine's caches: add --pool"),
        ("--pool 1GiB --target vllm --context 4k,x", "--context 'x': expected a number of tokens"),
        ("--pool 1GiB --target vllm --context 0", "--context '0': expected a number of tokens of at least 1"),
        ("--pool 1GiB --target vllm --state-dtype int8", "state-dtype 'int8': must be one of float32"),
        ("--pool 1GiB --target sglang --tp 0", "tp 0: must be at least 1"),
        ("--pool 1GiB --target sglang --tp 3", "cannot be split evenly"),
        ("--pool 1GiB --target llama.cpp --prefix-caching", "prefix-caching: llama.cpp has no such slots"),
    ],
)
def test_options_that_make_no_sense(options: str, says: str, tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "m", layers=1, tokenizer=False, vocabulary=31)
    refused(tmp_path, (says,), "inspect", folder, *options.split())


def test_an_engine_that_is_no_target_needs_a_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved_model(tmp_path / "m", layers=1, tokenizer=False, vocabulary=31)
    monkeypatch.setattr(targets, "names", lambda: ("hf", "vllm"))
    says = "target sglang: only the memory of its caches is known: add --pool"
    refused(tmp_path, (says,), "inspect", folder, "--target", "sglang")
