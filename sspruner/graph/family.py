"""What a family of state-space models has to provide. One family = one short file that subclasses Family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sspruner.graph.layout import Layout, Size


@dataclass(frozen=True)
class Projected:
    """What a Mamba2-type mixer feeds to its scan, exactly as its forward computes it.

    x (b, T, H, P), z (b, T, H*P), dt (b, T, H) after softplus and clamp, A (H,) negative, B and C (b, T, G, N),
    D (H,). b batch, T tokens, H heads, P head dim, G groups, N state.
    """

    x: torch.Tensor
    z: torch.Tensor
    dt: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor


@dataclass(frozen=True)
class SelectiveProjected:
    """What a Mamba1-type mixer feeds to its scan: the decay differs by channel and state.

    x (b, T, G, P), z (b, T, G*P), dt (b, T, G, P) after softplus, A (G, P, N) negative, B and C (b, T, G, N),
    D (G, P). G independent scans (1 in Mamba1, the heads of Zamba) of P channels each.
    """

    x: torch.Tensor
    z: torch.Tensor
    dt: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor


class Family(ABC):
    """Describes one kind of mixer. Registered through the hook `sspruner_families`.

    name           as shown by `sspruner inspect`. Where it is the config's `model_type`, the engine also describes the
                   rest of the model (attention, MLP, hidden size, blocks); a mixer in another model is traced alone
    mixer_class    class name of the mixer module: recognised by name, so that nothing has to be imported
    config_sizes   stock config fields that hold one value for all layers: field -> a sum of products of dimensions
    config_epsilon config field of the epsilon of the norms over the residual stream, if nothing else reads it
    config_lists   config fields with one entry per block, cut with the blocks
    basis_refused  why the state cannot have another basis, "" if it can (needs `state_encode` and `state_decode` in
                   layout and project, see mamba2_type.py)
    mixer_axis     whether the rest of a block still does something without its mixer (axis `mixer`)
    """

    name: str
    mixer_class: str
    config_sizes: dict[str, Size] = {}
    config_epsilon: str = ""
    config_lists: tuple[str, ...] = ()
    basis_refused: str = "the mixer's code has no projection of B and C"
    mixer_axis: bool = False

    def recognises(self, module: nn.Module) -> bool:
        """Whether `module` is a mixer of this family."""
        return type(module).__name__ == self.mixer_class

    @abstractmethod
    def layout(self, mixer: nn.Module) -> Layout:
        """Where the rows of this mixer live. Must not touch values: the mixer may be on the meta device."""

    @abstractmethod
    def project(self, mixer: nn.Module, hidden: torch.Tensor, mask: torch.Tensor) -> Projected | SelectiveProjected:
        """Recompute what `mixer` feeds to its scan from its input.

        hidden: (b, T, hidden size), the mixer's input. mask: bool (b, T), False where padding.
        """

    def readout(self, mixer: nn.Module, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor | None:
        """What `mixer` gives its out_proj, from the scan's output y, fp32 (b, T, H, P), and the gate z, (b, T, H*P).

        fp32 (b, T, H*P); None if the family does not say: then it is observed, in one more run of the block.
        """
        return None

    def belongings(self, model: nn.Module, block: str) -> tuple[str, ...]:
        """Paths of modules outside `block` that only this block uses."""
        return ()

    def keep_blocks(self, model: Any, keep: Sequence[int]) -> None:
        """Repair what counts blocks, once only the blocks `keep` (old indices) are left: config and lookup tables."""
        config = model.config
        config.num_hidden_layers = len(keep)
        for name in self.config_lists:
            values = getattr(config, name)
            setattr(config, name, [values[i] for i in keep])
