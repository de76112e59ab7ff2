"""Read a text as a server decodes it: a few tokens at a time, with recurrent states that are stored in few bits.

Transformers keeps the recurrent state in fp32. An engine may store it in less, and then each step reads what the step
before has rounded. Here the states in the model's cache are rounded in place, so the model's own code runs: dense, cut,
masked or projected. Convolution states and keys and values stay as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from sspruner.compute.acceleration import accelerating
from sspruner.compute.forward import cache_in, forward
from sspruner.errors import InputError, ModelError
from sspruner.evaluation.state_rounding import FORMATS, fed_back, rounded
from sspruner.graph.known import installed_families
from sspruner.recipes.measure import StoredState

State = tuple[int, int]  # layer of the cache, number of the state in it


class Decoded(nn.Module):
    """A model whose forward reads its tokens `every` at a time, and then stores its states as `stored` says.

    The forward returns `logits`, (b, T, V), as the model's own does, and takes padding on the right only. Tokens
    between two stores are run at once if all mixers scan in chunks, else one by one: transformers' Mamba1 mixers start
    several tokens from an empty state.

    stored: None keeps the states as they are. seed: of stochastic rounding. watch: called with the number of tokens
    read since its last call.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int,
        stored: StoredState | None = None,
        seed: int = 0,
        watch: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.every, self.stored, self.seed, self.watch = model, every, stored, seed, watch
        self.block = every if chunks(model) else 1
        self.training = model.training  # `forward` restores it in all modules

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        """Return a namespace with logits after every token. input_ids: int64 (b, T); attention_mask: 0 at padding."""
        lengths = _lengths(input_ids, attention_mask)
        store = None if self.stored is None else Store(self.stored, input_ids, lengths, self.seed)
        b, T = input_ids.shape
        cache: dict[str, Any] = {}
        logits: torch.Tensor | None = None
        with accelerating(self.model):
            for start in range(0, T, self.block):
                stop = min(start + self.block, T)
                # Positions are explicit, because some models do not count them from the cache (Bamba).
                positions = torch.arange(start, stop, device=input_ids.device).expand(b, -1)
                out = forward(self.model, input_ids[:, start:stop], use_cache=True, position_ids=positions, **cache)
                cache = cache_in(out)
                if logits is None:
                    logits = out.logits.new_empty(b, T, out.logits.shape[-1])
                logits[:, start:stop] = out.logits
                if store is not None and stop % self.every == 0:
                    store(recurrent_states(cache))
                if self.watch is not None:
                    self.watch(b * (stop - start))
        return SimpleNamespace(logits=logits)


class Store:
    """Round the recurrent states of a batch in place, each time that they are stored.

    Each sequence has random numbers of its own, from the seed and its tokens, and residuals of its own: the result does
    not depend on the other sequences of the batch. tokens: int64 (b, T); lengths: without padding, (b,).
    """

    def __init__(self, stored: StoredState, tokens: torch.Tensor, lengths: list[int], seed: int) -> None:
        self.stored, self.form = stored, FORMATS[str(stored.state_dtype)]
        rows = [row[:n] for row, n in zip(tokens.cpu(), lengths, strict=True)]
        self.generators = [torch.Generator().manual_seed(_seed_of(row, seed)) for row in rows]
        self.residuals: dict[State, torch.Tensor] = {}

    def __call__(self, states: dict[State, torch.Tensor]) -> None:
        """Round every state, (b, ..., N) each. Raises ModelError for one that the format cannot hold."""
        for where, state in states.items():
            wide = state.float()
            if not self.form.scaled and bool((wide.abs() > self.form.largest).any()):
                raise ModelError(
                    f"state-dtype {self.stored.state_dtype}: the state of layer {where[0]} reaches "
                    f"{float(wide.abs().max()):.3g}, beyond {self.form.largest:.6g}; choose bf16, fp8 or int8"
                )
            if self.stored.rounding == "feedback":
                residual = self.residuals.get(where, torch.zeros_like(wide))
                narrow, self.residuals[where] = fed_back(wide, residual, self.form)
            else:
                narrow = rounded(wide, self.form, self._noise(wide) if self.stored.rounding == "stochastic" else None)
            state.copy_(narrow)

    def _noise(self, state: torch.Tensor) -> torch.Tensor:
        """Return uniform random numbers in the shape of a state, the same on every device."""
        return torch.stack([torch.rand(state.shape[1:], generator=g) for g in self.generators]).to(state.device)


def recurrent_states(cache: dict[str, Any]) -> dict[State, torch.Tensor]:
    """Return the recurrent states in a cache, (b, ..., N) each: {} if it has none. cache: as of `cache_in`."""
    layers = getattr(next(iter(cache.values()), None), "layers", ())
    return {
        (i, number): state
        for i, layer in enumerate(layers)
        for number, state in (getattr(layer, "recurrent_states", None) or {}).items()
        if state is not None
    }


def mixers(model: nn.Module) -> list[nn.Module]:
    """Return the state-space mixers of known families in a model, which may be quantised or adapted."""
    families = installed_families().values()
    return [module for module in model.modules() if any(family.recognises(module) for family in families)]


def chunks(model: nn.Module) -> list[int]:
    """Return the chunk lengths of the model's scans, in order; [] if a mixer scans without chunks."""
    sizes = [getattr(mixer, "chunk_size", None) for mixer in mixers(model)]
    return sorted({size for size in sizes if isinstance(size, int)}) if all(isinstance(s, int) for s in sizes) else []


def _lengths(tokens: torch.Tensor, mask: torch.Tensor | None) -> list[int]:
    """Return the number of tokens of each sequence. Raises InputError for padding that is not on the right."""
    if mask is None:
        return [tokens.shape[1]] * len(tokens)
    lengths = mask.long().sum(1)
    if not torch.equal(torch.arange(mask.shape[1], device=mask.device) < lengths[:, None], mask.bool()):
        raise InputError("a text that is read step by step has padding before or between its tokens; pad on the right")
    return [int(n) for n in lengths]


def _seed_of(tokens: torch.Tensor, seed: int) -> int:
    """Return the seed of a sequence's random numbers. tokens: int64 (T,), without padding."""
    data = f"{seed}:{tokens.tolist()}".encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
