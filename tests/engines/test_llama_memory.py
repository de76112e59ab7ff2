"""Memory as llama.cpp allocates it, against the formulas: delta rules, latent attention, Mamba2 for comparison."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import sspruner
from sspruner.benchmarking.cache_layers import cache_layers
from sspruner.benchmarking.llama_cache import LlamaCache
from support.engines import needs, run
from support.gguf_cases import cut
from support.zoo import zoo

pytestmark = needs("llama")

TOKENS = 512
WIDE: dict[str, Any] = {
    "bias": False, "layers": "MMMMMMMMMA", "heads": 64, "kv": 32, "hidden_size": 64, "linear_head_dim": 32,
    "kv_lora_rank": 120, "qk_rope_head_dim": 8, "intermediate_size": 64, "rms_norm_eps": 1e-6,
}  # fmt: skip


def test_llama_cpp_allocates_what_is_counted(tmp_path: Path) -> None:
    gdn, _ = sspruner.load("gdn-books", dtype="float32")
    mamba, _ = sspruner.load(dtype="float32")
    models = [
        gdn, cut(copy.deepcopy(gdn), "group", "attn_head"), mamba, zoo("kimi_linear", q_lora_rank=None, **WIDE),
        zoo("bailing_hybrid", **WIDE),
    ]  # fmt: skip
    files = []
    for i, model in enumerate(models):
        files.append(sspruner.export(model, tmp_path / str(i), to="gguf") / "model.gguf")
    for model, found in zip(models, json.loads(run("llama", "llama_memory.py", *map(str, files))), strict=True):
        cache = LlamaCache(cache_layers(model, sspruner.trace(model)))
        kept = sum(float(found.get(name, 0)) for name in "KV")
        assert (found["R"], found["S"]) == (f"{cache.conv_bytes / 2**20:.2f}", f"{cache.state_bytes / 2**20:.2f}")
        assert abs(kept - TOKENS * cache.kv / 2**20) <= 0.01
