"""Qwen3-Next: a gated delta net or gated attention in each layer, each followed by experts or an MLP.

The rows of q, k, v and z are interleaved by key head, and so are those of b and a; the convolution's are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sspruner.graph.families.delta_type import ATTENTION_SIZES, CONFIG_SIZES, EXPERT_SIZES, A, B, DeltaNet, K, Q, V, Z
from sspruner.graph.family import Family
from sspruner.graph.layout import Rows, Slot
from sspruner.plugins.hookspecs import hookimpl


def _inside(rows: Rows) -> Rows:
    """Return a run of rows of one key head."""
    return Rows(rows.name, rows.dims[1:])


class Qwen3Next(DeltaNet):
    """Family of Qwen3-Next models."""

    name, mixer_class = "qwen3_next", "Qwen3NextGatedDeltaNet"
    config_sizes = CONFIG_SIZES | ATTENTION_SIZES | EXPERT_SIZES

    def projections(self, mixer: Any) -> tuple[Slot, ...]:
        groups = ("group",)
        return (
            Slot("in_proj_qkvz.weight", 0, tuple(map(_inside, (Q, K, V, Z))), outer=groups),
            Slot("in_proj_ba.weight", 0, tuple(map(_inside, (B, A))), outer=groups),
        )

    def keep_blocks(self, model: Any, keep: Sequence[int]) -> None:
        super().keep_blocks(model, keep)
        config = model.config
        dense, step = config.mlp_only_layers or [], config.decoder_sparse_step
        config.mlp_only_layers = [i for i, old in enumerate(keep) if old in dense or (old + 1) % step]
        config.decoder_sparse_step = 1  # the kinds of layers are no longer periodic: the list says them


@hookimpl
def sspruner_families() -> list[Family]:
    return [Qwen3Next()]
