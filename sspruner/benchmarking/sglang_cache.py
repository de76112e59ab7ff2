"""SGLang's caches: one pool of state slots and another of keys and values. Formulas of SGLang 0.5.23.

Sources, all sgl-project/sglang @ 0.5.23, python/sglang/srt: configs/mamba_utils.py `mamba_cache_per_req`;
mem_cache/kv_cache_configurator.py `_handle_max_mamba_cache`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sspruner.benchmarking.cache_layers import CacheLayers
from sspruner.errors import InputError
from sspruner.recipes.serving import CACHE_DTYPES, DEFAULTS, EngineOptions

RATIO = 0.9  # --mamba-full-memory-ratio: bytes of state slots / bytes of keys and values
CONV_BYTES = 2  # SGLANG_MAMBA_CONV_DTYPE: bfloat16
CACHING_SLOTS = 5  # slots of one request: with a radix cache, its extra buffer and the overlapped scheduler; else 1


@dataclass(frozen=True)
class SglangCache:
    """SGLang's two pools for the layers of one model, on one of `tp` GPUs. Sizes in bytes."""

    layers: CacheLayers
    options: EngineOptions = DEFAULTS
    tp: int = 1

    name = "sglang"

    def __post_init__(self) -> None:
        """Raise InputError for options that SGLang does not have for such a model."""
        self.layers.check_tp(self.tp)
        if self.options.replayssm:
            raise InputError("replayssm: SGLang 0.5.23 has it for gated delta nets and KDA alone")

    @property
    def state_dtype(self) -> str:
        """Dtype of the recurrent state."""
        return self.options.state_dtype or self.layers.state_dtype("mamba_ssm_dtype") or "float32"

    @property
    def kv_dtype(self) -> str:
        """Dtype of keys and values."""
        return self.options.kv_dtype or self.layers.dtype

    @property
    def slot_bytes(self) -> int:
        """Bytes of one state slot, over all recurrent layers."""
        layer = self.layers.layer
        conv = (layer.kernel - 1) * layer.conv_channels(self.tp) * CONV_BYTES
        return self.layers.recurrent * (conv + layer.state // self.tp * CACHE_DTYPES[self.state_dtype])

    @property
    def kv(self) -> int:
        """Bytes of keys and values of one token, over all attention layers."""
        return self.layers.attention * self.layers.kept(self.tp) * CACHE_DTYPES[self.kv_dtype]

    @property
    def slots_per_sequence(self) -> int:
        """State slots of one request."""
        return CACHING_SLOTS if self.options.prefix_caching else 1

    def slots(self, pool: float, ratio: float = RATIO) -> int:
        """Return the state slots in a pool that states share with keys and values, `ratio` of bytes to bytes.

        One slot more is padding. Drafts keep a state each, for as many requests as run.
        """
        drafts, budget = self.options.spec, int(pool * ratio / (1 + ratio))
        each = self.slot_bytes * (1 + drafts / self.slots_per_sequence)
        return max(0, int((budget - self.slot_bytes * (1 + drafts)) // each))

    def tokens(self, pool: float, ratio: float = RATIO) -> int | None:
        """Return the tokens whose keys and values fit beside the state slots; None without attention."""
        if not self.kv:
            return None
        return max(0, int(pool - (self.slots(pool, ratio) + 1) * self.slot_bytes)) // self.kv

    def requests(self, slots: int) -> int:
        """Return the requests that so many slots let run at once."""
        return slots // self.slots_per_sequence

    def sequences(self, pool: float, context: int, ratio: float = RATIO) -> int:
        """Return the sequences of `context` tokens that run at once: enough slots, and room for keys and values."""
        running, tokens = self.requests(self.slots(pool, ratio)), self.tokens(pool, ratio)
        return running if tokens is None else min(running, tokens // max(2, context))

    def bytes_per_sequence(self, context: int) -> int:
        """Return the bytes that a sequence of `context` tokens takes of both pools."""
        return self.slots_per_sequence * self.slot_bytes + context * self.kv

    def balanced_ratio(self, context: int) -> float | None:
        """Return the --mamba-full-memory-ratio at which slots and tokens last equally long; None without attention."""
        return self.slots_per_sequence * self.slot_bytes / (context * self.kv) if self.kv else None

    def facts(self, pool: float) -> dict[str, Any]:
        """Return the sizes that do not depend on the context, by name."""
        return {
            "state_dtype": self.state_dtype,
            "kv_dtype": self.kv_dtype if self.kv else None,
            "slot_bytes": self.slot_bytes,
            "slots_per_sequence": self.slots_per_sequence,
            "slots": self.slots(pool),
            "kv_bytes_per_token": self.kv or None,
            "tokens": self.tokens(pool),
        }

    def at(self, pool: float, context: int) -> dict[str, Any]:
        """Return what depends on the context, by name."""
        return {
            "context": context,
            "bytes_per_sequence": self.bytes_per_sequence(context),
            "balanced_ratio": self.balanced_ratio(context),
            "sequences": self.sequences(pool, context),
        }

    def layer_steps(self, context: int) -> list[str]:
        """Return nothing: each layer counts."""
        return []

    def notes(self, pool: float, contexts: tuple[int, ...]) -> list[str]:
        """Describe what else to know."""
        lines = []
        if self.kv:
            lines.append(f"sglang shares the pool out by --mamba-full-memory-ratio {RATIO}, whatever the states' size")
        for context in contexts if self.kv else ():
            ratio = round(self.balanced_ratio(context) or 0, 3)
            more = self.sequences(pool, context, ratio) if ratio else 0
            lines.append(f"--mamba-full-memory-ratio {ratio:g} is balanced at {context:,} tokens: {more:,} sequences")
        if self.options.prefix_caching:
            lines.append("prefix caching with the extra buffer and overlap: 5 slots a request; no_buffer takes 3")
        else:
            lines.append("sglang keeps a radix cache unless told otherwise: --prefix-caching counts with it")
        return lines
