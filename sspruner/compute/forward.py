"""Run a model's forward on its own device, in eval mode, with only the arguments that it accepts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from sspruner.compute.inputs import input_name, reads_tokens
from sspruner.errors import InputError, ModelError

#: Names under which families take and return a cache: since transformers 5.24 the first, before one of the others.
CACHES = ("cache", "cache_params", "past_key_values")


def cache_in(out: Any) -> dict[str, Any]:
    """Return the cache in an output under the name by which the model takes it again; {} if there is none."""
    for name in CACHES:
        cache = out.get(name) if hasattr(out, "get") else getattr(out, name, None)
        if cache is not None:
            return {name: cache}
    return {}


def forward(model: nn.Module, tokens: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> Any:
    """Call model(input_ids=tokens, attention_mask=mask, **options), without arguments that it does not accept.

    tokens: int64 (b, T), or the values that a model reads instead, (b, T, ...), which get its dtype. mask: bool (b, T),
    False where padding. mamba_ssm's models accept neither mask nor use_cache. A model without attention layers, which
    would refuse to make a cache, is given one.
    """
    like = next(model.parameters(), tokens)
    device = like.device
    if mask is not None:
        options["attention_mask"] = mask.to(device).long()
    accepted_names = accepted(model)
    inside = options.get("use_cache") is False and "use_cache" not in accepted_names
    training = model.training
    model.eval()
    try:
        tokens = tokens.to(device, like.dtype if tokens.is_floating_point() else tokens.dtype)
        with without_caches(model) if inside else nullcontext():
            return call(model, tokens, {k: v for k, v in options.items() if k in accepted_names})
    finally:
        model.train(training)


@contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """Context manager: models inside a user's own module, which passes no `use_cache` on, make no cache.

    A cache would be among the arguments of the blocks, and carry the state of one run into the next.
    """
    configs = {id(config): config for m in model.modules() if (config := getattr(m, "config", None)) is not None}
    before = [(config, config.use_cache) for config in configs.values() if hasattr(config, "use_cache")]
    try:
        for config, _ in before:
            config.use_cache = False
        yield
    finally:
        for config, value in before:
            config.use_cache = value


def call(model: Any, ids: torch.Tensor, options: dict[str, Any]) -> Any:
    """Call model(input_ids=ids, **options); with a cache of ours if it refuses to make one (linear_cache.py)."""
    from sspruner.compute.linear_cache import LinearCache, linear_cache

    reads = {input_name(model): ids}
    try:
        out = model(**reads, **options)
    except ValueError:
        makes_one = options.get("use_cache") and not any(name in options for name in CACHES)
        ours = linear_cache(model) if makes_one else {}
        if not ours:
            raise
        options = {**options, **ours}
        out = model(**reads, **options)
    for name in CACHES:
        if isinstance(cache := options.get(name), LinearCache):
            cache.add(ids.shape[1])
    return out


def accepted(model: Any) -> set[str]:
    """Return the names of the arguments of this package that a model's forward accepts."""
    parameters = inspect.signature(model.forward).parameters
    names = {*parameters, *CACHES}
    native = hasattr(model, "allocate_inference_cache")  # passes unknown keywords on to its mixers
    if not native and any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        names |= {"attention_mask", "use_cache"}  # some models of transformers only pass these on
    return names


def embedding(model: Any) -> nn.Embedding:
    """Return the module that embeds tokens. Raises ModelError if there is none."""
    table: nn.Embedding | None = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    table = table or next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    if table is None:
        raise ModelError(f"{type(model).__name__}: no embedding found; it cannot be run on tokens")
    return table


def output_of(out: Any) -> torch.Tensor:
    """Return the tensor that a model puts out: logits, else its last hidden states, else the first tensor there is."""
    named = next((getattr(out, n) for n in ("logits", "last_hidden_state") if getattr(out, n, None) is not None), out)
    while isinstance(named, dict | tuple | list) and len(named):
        values = list(named.values()) if isinstance(named, dict) else named
        named = next((v for v in values if isinstance(v, torch.Tensor)), values[0])
    if not isinstance(named, torch.Tensor):
        raise ModelError(f"the model puts out {type(out).__name__}, in which there is no tensor")
    return named


@torch.no_grad()
def predicts_tokens(model: Any) -> bool:
    """Check whether a model puts out logits over its vocabulary, (b, T, V): perplexity, KL and losses need them."""
    if hasattr(model, "allocate_inference_cache"):  # mamba_ssm
        return hasattr(model, "lm_head")
    if not reads_tokens(model):
        return False
    if hasattr(model, "get_output_embeddings"):
        return model.get_output_embeddings() is not None
    table = embedding(model)
    tokens = torch.zeros(1, 2, dtype=torch.long)
    logits = getattr(forward(model, tokens), "logits", None)
    return isinstance(logits, torch.Tensor) and logits.shape == (1, 2, table.num_embeddings)


def check_predicts_tokens(model: Any, what: str) -> None:
    """Raise InputError for a model without logits over its vocabulary. what: what needs them."""
    if not predicts_tokens(model):
        raise InputError(f"{what}: needs a language model, and {no_tokens(model)}")


def no_tokens(model: Any) -> str:
    """Return the sentence for what is left out or refused where a model predicts no tokens."""
    return f"{type(model).__name__} puts out no logits over its vocabulary"
