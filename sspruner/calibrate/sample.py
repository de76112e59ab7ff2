"""Sample calibration text from the model itself, so that calibration needs no data and no network."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from sspruner.compute.acceleration import accelerating
from sspruner.compute.device import offloaded, on_device
from sspruner.compute.finite import refuse_not_finite
from sspruner.compute.forward import cache_in, forward, no_tokens, predicts_tokens
from sspruner.compute.processes import from_one
from sspruner.compute.quick import quick_on_cpu
from sspruner.errors import InputError


def own_text(model: Any, count: int, seq_len: int, seed: int, device: torch.device) -> torch.Tensor | None:
    """Sample text from a model, once for all processes: int64 (count, T). None for a model that cannot be sampled.

    These are models that predict no tokens, those of mamba_ssm, and those on disk, which would be read for every token.
    """
    if offloaded(model) or not predicts_tokens(model) or not hasattr(model.config, "bos_token_id"):
        return None
    with on_device(model, device):
        return from_one(lambda: sample_from(model, count, seq_len, seed=seed))


@torch.no_grad()
def sample_from(
    model: nn.Module,
    count: int,
    seq_len: int,
    *,
    seed: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> torch.Tensor:
    """Sample `count` sequences of `seq_len` tokens at temperature 1, starting from the BOS token: int64 (count, T).

    The end-of-text token does not stop a sequence: the tokens after it start a new text, as in training data.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "bos_token_id"):  # mamba_ssm
        raise InputError(f"calibration 'self': {type(model).__name__} cannot be sampled here; give text or tokens")
    if not predicts_tokens(model):
        raise InputError(f"calibration 'self': {no_tokens(model)}, so none can be sampled; give text or tokens")
    device = next(model.parameters()).device
    bos = next(i for i in (config.bos_token_id, config.eos_token_id, 0) if isinstance(i, int))
    generator = torch.Generator(device).manual_seed(seed)
    tokens = torch.full((count, 1), bos, device=device)
    cache: dict[str, Any] = {}
    with quick_on_cpu(model, device), accelerating(model):
        for done in range(1, seq_len):
            # Positions are explicit, because some models do not count them from the cache (Bamba).
            position = torch.full((count, 1), done - 1, device=device)
            out = forward(model, tokens[:, -1:], use_cache=True, position_ids=position, **cache)
            cache = cache_in(out)
            probabilities = out.logits[:, -1].float().softmax(-1)  # (count, vocabulary)
            if not probabilities.isfinite().all():
                refuse_not_finite(model, partial(forward, model, tokens, use_cache=False))
            tokens = torch.cat([tokens, probabilities.multinomial(1, generator=generator)], 1)
            if progress:
                progress("sampling calibration text", done, seq_len - 1)
    return tokens.cpu()
