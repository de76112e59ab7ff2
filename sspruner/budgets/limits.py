"""Limits: a budget in users' units, and the sizes that a plan leads to, predicted without a cut."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from sspruner.errors import InputError
from sspruner.units import parse_bytes, parse_increase, parse_parameters


@dataclass(frozen=True)
class Limits:
    """What a cut model may take and lose. What is None does not matter.

    state_bytes          of recurrent state per sequence, at most
    max_batch, memory    so many sequences beside the weights fit in so many bytes: recurrent and convolution states.
                         The key/value caches of hybrids grow with the text and are not counted
    parameters           at most: a count, or below or at 1 a fraction of the model's own
    perplexity_increase  at most, over the dense model's: 0.01 is 1 %. On calibration text
    kl                   to the dense model, at most, in nats per token. On calibration text
    """

    state_bytes: float | None = None
    max_batch: int | None = None
    memory: float | None = None
    parameters: float | None = None
    perplexity_increase: float | None = None
    kl: float | None = None

    def __post_init__(self) -> None:
        """Raise InputError for limits that make no sense."""
        if (self.max_batch is None) != (self.memory is None):
            raise InputError("max-batch and memory go together: how many sequences, in how many bytes")
        for name, value in asdict(self).items():
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise InputError(f"{name.replace('_', '-')} {value}: must be a number above 0")

    @property
    def of_size(self) -> bool:
        """Whether the size of the cut model is limited."""
        return any(limit is not None for limit in (self.state_bytes, self.memory, self.parameters))

    @property
    def of_damage(self) -> bool:
        """Whether what the cut costs is limited."""
        return self.perplexity_increase is not None or self.kl is not None

    def to_json(self) -> dict[str, float]:
        """What was asked for."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def limits_from(**texts: Any) -> Limits | None:
    """Limits from the command line's texts, by option with underscores; None where none is given."""
    read = {
        "state_bytes": parse_bytes,
        "memory": parse_bytes,
        "params": parse_parameters,
        "max_ppl_increase": parse_increase,
    }
    names = {"params": "parameters", "max_ppl_increase": "perplexity_increase", "max_kl": "kl"}
    values: dict[str, Any] = {
        names.get(option, option): read[option](value, f"--{option.replace('_', '-')}") if option in read else value
        for option, value in texts.items()
        if value is not None
    }
    return Limits(**values) if values else None
