"""Refuse absurd sizes in a config before lists or tensors of that size are created."""

from __future__ import annotations

from typing import Any

from torch import nn

from sspruner.errors import ModelError

LAYERS = 1000  # more than any model has; a config with more is wrong, and would take forever to build
COUNTS = 10_000  # limit for numbers of heads, experts, labels, ...
ROWS = 10_000_000  # limit for the rows of one tensor; index maps have an entry for each
PER_BYTE = 4  # parameters per byte of a weights file: more than any format packs


def check_counts(config: Any) -> None:
    """Raise ModelError for absurdly large counts anywhere in a config."""
    values = config.values() if isinstance(config, dict) else config if isinstance(config, list) else ()
    for value in values:
        check_counts(value)
    for field, value in config.items() if isinstance(config, dict) else ():
        most = LAYERS if "layer" in field else COUNTS if field.startswith("num_") else None
        if most is not None and isinstance(value, int) and value > most:
            raise ModelError(f"config.json: {field} is {brief_number(value)}; no model has so many")


def check_sizes(model: nn.Module, where: str, weight_bytes: int | None = None) -> None:
    """Raise ModelError for a model on the meta device with an absurdly large tensor, or too large for its files.

    weight_bytes: size of the weights files, if known.
    """
    for name, p in (*model.named_parameters(), *model.named_buffers()):
        if not all(rows <= ROWS for rows in p.shape):
            raise ModelError(f"{where}: config.json makes {name} {tuple(p.shape)}; no model has such a size")
    parameters = sum(p.numel() for p in model.parameters())
    if weight_bytes is not None and parameters > PER_BYTE * weight_bytes:
        raise ModelError(
            f"{where}: its weights lack most of the {parameters:,} parameters that config.json describes: they are "
            f"{weight_bytes:,} bytes"
        )


def brief_number(value: int) -> str:
    """Format a number, or the number of its bits if it is too long."""
    return f"{value:,}" if abs(value) < 10**30 else f"a number of {value.bit_length()} bits"
