"""`sspruner bench` in vLLM and llama.cpp on a CPU: every model decodes at every batch. How fast is not tested."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import sspruner
from support.engines import needs, python_of
from support.tiny import half, tiny_model, tokens

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {"batches": (1, 5), "prompt": 7, "generate": 3, "repeats": 2, "bandwidth": 1e9, "flops": 1e11}


def models(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    found = {name: tiny_model(state=32, head_dim=32).to(dtype) for name in ("dense", "pruned")}
    sspruner.apply(found["pruned"], half(sspruner.trace(found["pruned"])))
    return found


def measured(engine: str, name: str, models: dict[str, Any]) -> sspruner.Bench:
    """Return the bench of models in an engine, every row of which is there."""
    found = sspruner.bench(models, engine=engine, python=python_of(name), **SMALL)
    assert not found.failed
    assert Counter((row.model, row.batch) for row in found.rows) == Counter((m, b) for m in models for b in (1, 5))
    assert all(second > 0 for row in found.rows for second in row.seconds)
    assert found.engine["notes"] == [], "the tests' environment has the version that was checked"
    return found


@needs("llama")
def test_llama() -> None:
    found = measured("llama.cpp", "llama", models())
    assert found.engine["version"] == "2026.10.11549"
    assert found.row("dense", 1).cache_bytes > found.row("pruned", 1).cache_bytes > 0  # type: ignore[operator]


@needs("vllm")
def test_vllm() -> None:
    """A projected state is served by sspruner's plugin."""
    projected = tiny_model(state=32, head_dim=32)
    sspruner.prune(projected, "balanced", keep=8, calibration=tokens(8, 48))
    found = measured("vllm", "vllm", models() | {"projected": projected})
    assert found.engine["version"] == "0.32.0"
    assert found.machine["device"] == "cpu"


@needs("vllm")
def test_vllm_in_bfloat16() -> None:
    """Some CPUs keep a float32 state then, which must fit into the cache that is asked for."""
    measured("vllm", "vllm", models(torch.bfloat16))
