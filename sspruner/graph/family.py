"""Interface of a model family. Each family is one short file with a subclass of Family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sspruner.graph.layout import Layout, Size


@dataclass(frozen=True)
class Projected:
    """Inputs of a Mamba2-type mixer's scan, exactly as its forward pass computes them.

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
    """Inputs of a Mamba1-type mixer's scan, whose decay differs by channel and state.

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


@dataclass(frozen=True)
class DeltaProjected:
    """Inputs of a gated delta rule's scan, exactly as its forward pass computes them.

    S_t = a_t S_{t-1} + k_t beta_t (v_t - (a_t S_{t-1})^T k_t)^T        y_t = S_t^T q_t         S (K, V), by value head

    q and k (b, T, G, K) after the l2 norm, q with the factor 1/sqrt(K); v (b, T, H, V), z (b, T, H*V) the gate before
    its activation, beta (b, T, H), decay the logarithm of a: fp32 (b, T, H), or (b, T, H, K) where it differs by key
    channel. G key heads, each with H/G consecutive value heads. Source: Yang, Kautz & Hatamizadeh, "Gated Delta
    Networks", arXiv 2412.06464; by key channel: "Kimi Linear", arXiv 2510.26692.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    z: torch.Tensor
    beta: torch.Tensor
    decay: torch.Tensor

    @property
    def x(self) -> torch.Tensor:
        """Return what is written: v."""
        return self.v

    @property
    def B(self) -> torch.Tensor:
        """Return the vectors that write to the state: k."""
        return self.k

    @property
    def C(self) -> torch.Tensor:
        """Return the vectors that read it: q."""
        return self.q

    @property
    def dt(self) -> torch.Tensor:
        """Return how much of it is written: beta."""
        return self.beta


Scan = Projected | SelectiveProjected | DeltaProjected


class Family(ABC):
    """Base class that describes one kind of mixer. Registered through the hook `sspruner_families`.

    name           name printed by `sspruner inspect`. If it equals the config's `model_type`, the rest of the model
                   (attention, MLP, hidden size, blocks) is described, too; otherwise only the mixers are
    mixer_class    class name of the mixer module; recognised by name, so that nothing has to be imported
    config_sizes   stock config fields with one value for all layers: field -> a sum of products of dimensions, of the
                   mixers, or of the other modules that have these dimensions
    couplings      axis -> why a stock config cannot hold a cut of it alone, for config fields that several modules read
    config_epsilon config field of the epsilon of the norms over the residual stream, if nothing else reads it
    config_lists   config fields with one entry per block, cut with the blocks
    config_repeats config fields that hold sizes a second time and win when a config is read: a cut removes them
    basis_refused  reason why the state cannot be projected to another basis, "" if it can (then layout and project
                   must support `state_encode` and `state_decode`, see mamba2_type.py)
    causal         False for mixers that are meant to look ahead
    mixer_axis     True if a block without its mixer still has another module (axis `mixer`)
    stream_refused reason why the residual stream (axis `hidden`) and whole blocks (`block`, `mixer`) cannot be cut, ""
                   if they can
    norm, out      names of the norm after the scan and of the projection of its output
    """

    name: str
    mixer_class: str
    config_sizes: dict[str, Size] = {}
    couplings: dict[str, str] = {}
    config_epsilon: str = ""
    config_lists: tuple[str, ...] = ()
    config_repeats: tuple[str, ...] = ()
    basis_refused: str = "the mixer's code has no projection of B and C"
    causal: bool = True
    mixer_axis: bool = False
    stream_refused: str = ""
    norm: str = "norm"
    out: str = "out_proj"

    def recognises(self, module: nn.Module) -> bool:
        """Return whether `module` is a mixer of this family."""
        return type(module).__name__ == self.mixer_class

    @abstractmethod
    def layout(self, mixer: nn.Module) -> Layout:
        """Return the layout of this mixer. Must not read values: the mixer may be on the meta device."""

    @abstractmethod
    def project(self, mixer: nn.Module, hidden: torch.Tensor, mask: torch.Tensor) -> Scan:
        """Recompute the inputs of the mixer's scan from the mixer's input.

        hidden: (b, T, hidden size), the mixer's input. mask: bool (b, T), False where padding.
        """

    def gate(self, mixer: nn.Module, z: torch.Tensor) -> torch.Tensor:
        """Compute the factor that the gate z, (b, T, H*P), gives to the scan's output: fp32, in the shape of z."""
        return F.silu(z.float())

    def readout(self, mixer: nn.Module, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor | None:
        """Compute the input of `mixer`'s out_proj from the scan's output y, fp32 (b, T, H, P), and gate z, (b, T, H*P).

        Returns fp32 (b, T, H*P), or None if the family does not implement it: then out_proj's input is observed in
        another run of the block.
        """
        return None

    def fit(self, mixer: nn.Module) -> bool:
        """Replace the mixer's forward after a cut, where that of its class cannot take the sizes of its tensors.

        Returns whether the forward is another one than the class's.
        """
        return False

    def stock_sizes(self, layouts: Mapping[str, Layout]) -> dict[str, set[int]]:
        """Return what modules would need of each stock config field: field -> the values, one if a config can hold all.

        layouts: path of a module -> its layout, for all modules that the graph describes. A field that none of them
        reads has no values.
        """
        return {
            field: {layout.stock_total(size) for layout in layouts.values() if layout.has(size)}
            for field, size in self.config_sizes.items()
        }

    def belongings(self, model: nn.Module, block: str) -> tuple[str, ...]:
        """Return the paths of modules outside `block` that only this block uses."""
        return ()

    def keep_blocks(self, model: Any, keep: Sequence[int]) -> None:
        """Update the config and lookup tables that count blocks, after all but `keep` (old indices) were removed."""
        config = model.config
        config.num_hidden_layers = len(keep)
        for name in self.config_lists:
            values = getattr(config, name)
            setattr(config, name, [values[i] for i in keep])
