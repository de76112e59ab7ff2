"""What a family of state-space models has to provide. One family = one short file that subclasses Family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import nn

from sspruner.graph.layout import Layout


@dataclass(frozen=True)
class Projected:
    """What a mixer feeds to its scan, exactly as its forward computes it.

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


class Family(ABC):
    """Describes one kind of mixer. Registered through the hook `sspruner_families`.

    name          as shown by `sspruner inspect`
    mixer_class   class name of the mixer module: recognised by name, so that nothing has to be imported
    config_names  axis -> the config field of stock classes that holds its size, where one value serves all layers
    """

    name: str
    mixer_class: str
    config_names: dict[str, str] = {}

    @abstractmethod
    def layout(self, mixer: nn.Module) -> Layout:
        """Where the rows of this mixer live. Must not touch values: the mixer may be on the meta device."""

    @abstractmethod
    def project(self, mixer: nn.Module, hidden: torch.Tensor, mask: torch.Tensor) -> Projected:
        """Recompute what `mixer` feeds to its scan from its input.

        hidden: (b, T, hidden size), the mixer's input. mask: bool (b, T), False where padding.
        """
