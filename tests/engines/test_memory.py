"""Memory as the engine counts it, against the engine: what vLLM reports of its caches when it starts, on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sspruner
from sspruner.benchmarking.cache_layers import cache_layers
from sspruner.benchmarking.vllm_cache import VllmCache
from sspruner.io.skeleton import skeleton
from sspruner.io.source import REFERENCES
from sspruner.recipes.serving import EngineOptions
from support.engines import needs, run

pytestmark = [needs("vllm"), pytest.mark.slow]

POOL = 2**30
CPU_BLOCK = 128  # --block-size on a CPU, unless it is given


def cut(folder: Path, name: str, keep: int) -> Path:
    """Save a reference model with fewer states in every layer."""
    model, tokenizer = sspruner.load(name)
    graph = sspruner.trace(model)
    none = sspruner.Scores({n: torch.zeros(g.groups, g.units) for n, g in graph.on_axis("state").items()})
    return sspruner.save(sspruner.apply(model, sspruner.plan(graph, none, keep=keep)), folder / name, tokenizer)


#: model, states that stay, max_model_len, --block-size, prefix caching -> what runtimes.md measured, tokens or None
CASES: list[tuple[str, int | None, int, int, bool, int | None]] = [
    ("zamba2-books", None, 512, CPU_BLOCK, True, 46_592),
    ("zamba2-books", 32, 512, CPU_BLOCK, True, 46_592),
    ("zamba2-books", None, 512, 32, True, 66_560),
    ("zamba2-books", 32, 512, 32, True, 84_712),
    ("zamba2-books", None, 2048, 32, False, None),
    ("zamba2-books", 32, 2048, 32, False, None),
    ("mamba2-books-4m", None, 512, CPU_BLOCK, False, 659 * 512),
    ("mamba2-books-4m", 32, 512, CPU_BLOCK, False, 2470 * 512),
]


def test_vllm_counts_as_we_do(tmp_path: Path) -> None:
    folders: dict[tuple[str, int | None], Path] = {}
    requests: list[dict[str, Any]] = []
    for name, keep, length, size, prefix, _ in CASES:
        if (name, keep) not in folders:
            folders[name, keep] = REFERENCES / name if keep is None else cut(tmp_path, name, keep)
        requests.append(
            {
                "folder": str(folders[name, keep]),
                "max_model_len": length,
                "block_size": size,
                "enable_prefix_caching": prefix,
                "kv_cache_memory_bytes": POOL,
            }
        )
    asked, answers = tmp_path / "requests.json", tmp_path / "answers.json"
    asked.write_text(json.dumps(requests), encoding="utf-8")
    run("vllm", "vllm_memory.py", str(asked), str(answers), timeout=1800)
    for case, answer in zip(CASES, json.loads(answers.read_text(encoding="utf-8")), strict=True):
        name, keep, length, size, prefix, tokens = case
        model = skeleton(folders[name, keep], dtype=torch.float32)
        layers = cache_layers(model, sspruner.trace(model))
        cache = VllmCache(layers, EngineOptions(prefix_caching=prefix), block_size=size)
        assert answer == {
            "tokens": cache.tokens(POOL, length),
            "concurrency": cache.concurrency(POOL, length),
            "blocks": cache.blocks(POOL),
            "block_size": cache.block or length,  # without attention, a block is a whole sequence
            "prefix_caching": prefix,
        }, case
        assert tokens in (None, cache.tokens(POOL, length)), case
