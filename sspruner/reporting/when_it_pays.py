"""When it pays, in words: what a decode step of a model moves, and how much faster a cut can make it."""

from __future__ import annotations

from sspruner.benchmarking.gains import Gains
from sspruner.units import as_bytes

ADVICE = {  # the largest part -> what pays there; {} is what half of its bytes would give
    "weights": "The weights are the largest part: half of their bytes would give {:.2f}, so quantise those.",
    "states": "The states are the largest part: here a smaller state is what pays.",
    "KV cache": "The KV cache is the largest part: half of its bytes would give {:.2f}, so quantise or shorten that.",
}


def when_it_pays(gains: Gains) -> str:
    """Return what a step moves, what a cut can gain, what is the largest part, and how many sequences fit."""
    said = [_moved(gains), _gained(gains), ADVICE[gains.largest].format(gains.halved)]
    return " ".join([*said, *([] if gains.memory is None else [_fitting(gains, gains.memory)])])


def _moved(gains: Gains) -> str:
    dense, batch = gains.dense, gains.batch
    parts = [f"{_percent(share)} {name}" for name, share in gains.shares.items() if share]
    if dense.experts:
        parts[0] += f" (up to {dense.experts_read(batch)} of {dense.experts} experts)"
    length = f" of {dense.context:,} tokens" if dense.kv_bytes_per_token else ""
    sequences = "one sequence" if batch == 1 else f"{batch:,} sequences"
    step = as_bytes(dense.step_bytes(batch))
    return f"With {sequences}{length} a decode step moves at least {step}: {', '.join(parts)}."


def _gained(gains: Gains) -> str:
    """Return what each cut can gain; of the first one, also with one sequence, and with ever more."""
    first, *others = gains.cuts
    ends = [f"{gains.times(first, 1):.2f} with one sequence"] if gains.batch > 1 else []
    ends.append(f"towards {gains.limit(first):.2f} with ever more")
    said = [f"With {first} it is at most {gains.times(first, gains.batch):.2f} times as fast ({', '.join(ends)})"]
    return ", ".join([*said, *(f"with {name} {gains.times(name, gains.batch):.2f}" for name in others)]) + "."


def _fitting(gains: Gains, memory: float) -> str:
    name, smaller = next(iter(gains.cuts.items()))
    fit = gains.dense.sequences(memory)
    fewer = f" That is fewer than {gains.batch:,}." if fit < gains.batch else ""
    return f"In {as_bytes(memory)} fit {fit:,} sequences, with {name} {smaller.sequences(memory):,}.{fewer}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else "under 1 %"
