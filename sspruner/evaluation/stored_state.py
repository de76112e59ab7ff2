"""Measure what a recurrent state in few bits costs, together with a cut: KL first, beside the same model in fp32.

The windows are those of perplexity and KL, decoded from an empty state. With a dense model, both the model with stored
states and the same model with fp32 states are compared with it; without one, the first with the second. All are decoded
in the same steps, so what decoding itself rounds is in all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sspruner.calibrate.sources import Progress
from sspruner.compute.forward import cache_in, embedding, forward
from sspruner.errors import InputError
from sspruner.evaluation.decoded import Decoded, chunks, mixers, recurrent_states
from sspruner.evaluation.result import Row
from sspruner.evaluation.rows import perplexities, rates
from sspruner.evaluation.state_rounding import FORMATS, stored_bytes
from sspruner.evaluation.windows import Windows, joined, logits_of, losses_by_batch
from sspruner.recipes.measure import StoredState

LOGITS_BYTES = 2**28  # of the fp32 logits of one batch; decoding needs little else, and is quicker in large batches


def stored_state(
    both: tuple[nn.Module, nn.Module | None],
    data: Windows,
    stored: StoredState,
    every: int,
    seed: int,
    progress: Progress | None = None,
) -> tuple[dict[str, Row], dict[str, Any]]:
    """Return rows by metric, KL first, and how and in how many bytes the states of one sequence were stored.

    Of each row, `value` is with stored states, `against` with fp32 states.

    Raises:
        InputError: for a model whose states cannot be reached, and if no stored state would be read again.
        ModelError: for a state beyond the numbers of the format.
    """
    model, against = both
    shapes = state_shapes(model)
    if against is not None:
        state_shapes(against)
    longest = data.tokens.shape[1]
    if every >= longest:
        raise InputError(f"every {every}: the longest window has {longest} tokens, so that no stored state would be "
                         "read again; give a longer text and --max-length")  # fmt: skip
    batches = list(data.batches(max(1, LOGITS_BYTES // (4 * longest * embedding(model).num_embeddings))))
    total = (2 if against is None else 3) * sum(batch.tokens.numel() for batch in batches)
    watch = _counter(progress, f"decoding, {stored.state_dtype} and fp32 states", total)
    versions = [logits_of(Decoded(model, every, stored, seed, watch))]
    plain = logits_of(Decoded(model, every, watch=watch))
    if against is not None:
        versions.append(plain)
    dense = plain if against is None else logits_of(Decoded(against, every, watch=watch))
    parts = list(losses_by_batch(batches, versions, dense))
    narrow = joined([part for _, (part, *_) in parts])
    if against is None:
        wide = joined([part for part, _ in parts if part is not None])
    else:
        wide = joined([part for _, (_, part) in parts])
    assert narrow.kl is not None
    assert narrow.agreement is not None
    name, count = "dense" if against is not None else "fp32_state", narrow.tokens
    rows = [
        rates(f"kl_to_{name}", narrow.kl, wide.kl, count, seed),
        rates("top1_agreement", narrow.agreement, wide.agreement, count, seed),
        perplexities("perplexity", narrow.nll, wide.nll, count, seed, len(narrow.nll)),
    ]
    form = FORMATS[str(stored.state_dtype)]
    how = {"dtype": stored.state_dtype, "rounding": stored.rounding, "every": every, "scaled": form.scaled}
    bytes_of = {"fp32_bytes": sum(4 * torch.Size(shape).numel() for shape in shapes),
                "bytes": sum(stored_bytes(shape, form) for shape in shapes)}  # fmt: skip
    return {row.metric: row for row in rows}, how | bytes_of


def _counter(progress: Progress | None, phase: str, total: int) -> Callable[[int], None]:
    """Return a function that reports how many of `total` tokens were read, given how many more there are."""
    done = 0

    def watch(more: int) -> None:
        nonlocal done
        done += more
        if progress:
            progress(phase, done, total)

    return watch


def every_of(stored: StoredState, model: nn.Module) -> int:
    """Return how many tokens lie between two stores, 0 if no state is stored. Ask before `quick_on_cpu` is open.

    Raises InputError for "chunk" if the model has no chunk, or several.
    """
    if stored.state_dtype is None:
        return 0
    if stored.every != "chunk":
        return int(stored.every or 1)
    sizes = chunks(model)
    if len(sizes) != 1:
        has = f"chunks of {', '.join(map(str, sizes))} tokens" if sizes else "no chunks"
        raise InputError(f"every chunk: {type(model).__name__} has {has}; give a number of tokens")
    return sizes[0]


@torch.no_grad()
def state_shapes(model: nn.Module) -> list[torch.Size]:
    """Return the shape of each recurrent state of one sequence, (..., N).

    Raises InputError if not every state-space mixer of the model keeps its state in transformers' cache.
    """
    cache = cache_in(forward(model, torch.zeros(1, 1, dtype=torch.long), use_cache=True))
    shapes = [state.shape[1:] for state in recurrent_states(cache).values()]
    if not shapes or len(shapes) < len(mixers(model)):
        raise InputError(
            f"state-dtype: {type(model).__name__} has {len(mixers(model))} state-space mixers of a known family, and "
            f"{len(shapes)} recurrent states in a cache of transformers; a state that is elsewhere cannot be stored in "
            "another format (sspruner.load reads mamba_ssm's checkpoints with transformers' classes)"
        )
    return shapes
