"""EngineMemory: what an engine makes of a pool of memory, before and after a cut. One class for each engine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

from sspruner.benchmarking.cache_layers import CacheLayers
from sspruner.benchmarking.llama_cache import LlamaCache
from sspruner.benchmarking.sglang_cache import SglangCache
from sspruner.benchmarking.vllm_cache import VllmCache
from sspruner.errors import InputError
from sspruner.recipes.serving import DEFAULTS, EngineOptions


class EngineCache(Protocol):
    """Interface: the caches of one model in one engine."""

    @property
    def layers(self) -> CacheLayers:
        """Layers that keep a cache."""

    @property
    def state_dtype(self) -> str:
        """Dtype of the recurrent state."""

    @property
    def slot_bytes(self) -> int:
        """Bytes of one state slot, over all recurrent layers."""

    def sequences(self, pool: float, context: int) -> int:
        """Return the sequences of `context` tokens that run at once in a pool of so many bytes."""

    def bytes_per_sequence(self, context: int) -> int:
        """Return the bytes that a sequence of `context` tokens takes."""

    def facts(self, pool: float) -> dict[str, Any]:
        """Return the sizes that do not depend on the context, by name."""

    def at(self, pool: float, context: int) -> dict[str, Any]:
        """Return what depends on the context, by name."""

    def layer_steps(self, context: int) -> list[str]:
        """Describe how many layers a cut must remove before a sequence takes less memory; empty if each counts."""

    def notes(self, pool: float, contexts: tuple[int, ...]) -> list[str]:
        """Describe what else to know."""


CACHES = {"vllm": VllmCache, "sglang": SglangCache, "llama.cpp": LlamaCache}


def engine_cache(engine: str, layers: CacheLayers, options: EngineOptions = DEFAULTS, tp: int = 1) -> EngineCache:
    """Return the caches of a model in an engine. Raises InputError for options that it does not have."""
    if engine not in CACHES:
        raise InputError(f"engine {engine!r}: unknown; its memory is counted for {', '.join(CACHES)}")
    cache: EngineCache = CACHES[engine](layers, options, tp)
    return cache


@dataclass(frozen=True)
class EngineMemory:
    """Caches of a model in an engine, and of the model after a plan, with a pool of so many bytes on each GPU."""

    engine: str
    pool: float
    contexts: tuple[int, ...]
    options: EngineOptions
    tp: int
    dense: EngineCache
    cut: EngineCache | None = None

    @property
    def notes(self) -> list[str]:
        """Describe what else to know of the model that will be served."""
        served = self.cut or self.dense
        lines = [f"{self.engine} counts layers in groups: {line}" for line in served.layer_steps(self.contexts[0])]
        lines += served.notes(self.pool, self.contexts)
        if served.layers.uneven:
            lines.insert(0, "layers differ; counted in the largest size, to which export --to hf-padded pads them")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as a JSON object."""
        return {
            "name": self.engine,
            "tp": self.tp,
            "pool_bytes": self.pool,
            "options": asdict(self.options),
            "model": self._of(self.dense),
            "with_plan": None if self.cut is None else self._of(self.cut),
            "notes": self.notes,
        }

    def _of(self, cache: EngineCache) -> dict[str, Any]:
        found = cache.facts(self.pool) | {"contexts": [cache.at(self.pool, context) for context in self.contexts]}
        if isinstance(cache, VllmCache):
            found["block_sizes"] = [
                {"block_size": other.block_size, "block_tokens": other.block, "page_padding": other.padding}
                | {"sequences": [other.sequences(self.pool, context) for context in self.contexts]}
                for other in cache.other_blocks()
            ]
        return found


def engine_memory(
    engine: str,
    layers: tuple[CacheLayers, CacheLayers | None],
    options: EngineOptions,
    *,
    tp: int,
    pool: float,
    contexts: tuple[int, ...],
) -> EngineMemory:
    """Return the memory of a model and, if there is a plan, of the model after it; layers: of the two."""
    dense, cut = (None if one is None else engine_cache(engine, one, options, tp) for one in layers)
    assert dense is not None
    return EngineMemory(engine, pool, contexts, options, tp, dense, cut)
