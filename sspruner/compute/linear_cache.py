"""Cache for models without attention layers, which counts the tokens that it has seen.

transformers counts them in the first attention layer of a cache. Hybrids that have none, such as a Qwen3.5 of gated
delta nets alone, therefore refuse every cache, although they could fill one: they get this one.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

ASKED = ("cache", "past_key_values")  # names under which such models take a cache: since transformers 5.24 the first


class LinearCache(DynamicCache):  # type: ignore[misc]
    """Cache of linear layers alone. Who runs the model says with `add` how many tokens it has seen."""

    seen = 0

    def add(self, tokens: int) -> None:
        """Count tokens that a forward has put into the cache."""
        self.seen += tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens seen."""
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return the length of keys that an attention layer would have, and their offset."""
        return self.seen + query_length, 0


def linear_cache(model: Any) -> dict[str, LinearCache]:
    """Return an empty cache for a model without attention, under the name by which it takes one; {} for others.

    For a model that has refused to make a cache: Mamba2, which needs no such count, makes its own.
    """
    parameters = inspect.signature(model.forward).parameters
    name = next((name for name in ASKED if name in parameters), "")
    if not name or not hasattr(getattr(model, "config", None), "get_text_config"):
        return {}
    cache = LinearCache(config=model.config)
    attends = any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)
    return {} if attends or not cache.layers else {name: cache}
