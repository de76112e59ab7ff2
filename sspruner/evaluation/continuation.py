"""Generate a short greedy continuation, so that a person can judge the model's text."""

from __future__ import annotations

from typing import Any

import torch

from sspruner.compute.linear_cache import linear_cache


@torch.no_grad()
def continuation(model: Any, tokenizer: Any, prompt: torch.Tensor, new_tokens: int = 40) -> str:
    """Return the text that the model adds to `prompt`, int64 (T,), greedily and without a repetition penalty.

    A model without attention layers that refuses a cache reads the whole text for every token.
    """
    ids = prompt[None].to(next(model.parameters()).device)
    pad = model.generation_config.pad_token_id
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": new_tokens,
        "do_sample": False,
        "pad_token_id": 0 if pad is None else pad,
    }
    try:
        out = model.generate(ids, **options)
    except ValueError:
        if not linear_cache(model):
            raise
        out = model.generate(ids, use_cache=False, **options)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
