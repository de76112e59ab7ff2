"""SSMView: what a scorer sees of one mixer on one calibration batch. Computed on first use, shared by scorers."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import nn

from sspruner.calibrate import state
from sspruner.errors import PluginError
from sspruner.graph.family import Projected
from sspruner.graph.group import DependencyGroup
from sspruner.graph.ssm_graph import Layer


class SSMView:
    """One mixer on one batch. Everything is read-only and in the model's dtype unless it says fp32.

    layer       module path of the mixer
    mask        bool (b, T): False where padding; padded positions must not enter statistics
    tokens      number of positions where mask is True
    weights     `<tensor>:<rows>` -> fp32 (groups, units, elements), the members of the scored group, e.g.
                `in_proj.weight:B` (G, N, hidden size) on the axis `state`
    x z dt A B C D   what the mixer feeds to its scan: see sspruner.graph.family.Projected
    y           fp32 (b, T, H, P): the scan's output, before gate and norm
    """

    def __init__(
        self, layer: Layer, group: DependencyGroup, mixer: nn.Module, hidden: torch.Tensor | None, mask: torch.Tensor
    ) -> None:
        self.layer = layer.path
        self.mask = mask
        self.group = group
        self._family, self._mixer, self._hidden = layer.family, mixer, hidden

    @cached_property
    def projected(self) -> Projected:
        """x, z, dt, A, B, C, D together, as the functions of sspruner.calibrate.state take them."""
        if self._hidden is None:
            raise PluginError("a scorer with needs='weights' read activations; set needs='activations'")
        with torch.no_grad():
            return self._family.project(self._mixer, self._hidden, self.mask)

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        """The members of the scored group: `<tensor>:<rows>` -> fp32 (groups, units, elements)."""
        parameters = dict(self._mixer.named_parameters(remove_duplicate=False))
        short = {m: m.parameter.removeprefix(f"{self.layer}.") for m in self.group.members}
        return {f"{name}:{m.rows}": m.gather(parameters[name]) for m, name in short.items()}

    @cached_property
    def tokens(self) -> int:
        """Number of tokens that count."""
        return int(self.mask.sum())

    @property
    def x(self) -> torch.Tensor:
        """(b, T, H, P) input of the scan, after conv and SiLU."""
        return self.projected.x

    @property
    def z(self) -> torch.Tensor:
        """(b, T, H*P) gate, before SiLU."""
        return self.projected.z

    @property
    def dt(self) -> torch.Tensor:
        """(b, T, H) step size, after softplus and clamp."""
        return self.projected.dt

    @property
    def A(self) -> torch.Tensor:
        """(H,) decay rate, negative."""
        return self.projected.A

    @property
    def B(self) -> torch.Tensor:
        """(b, T, G, N) input vectors, after conv and SiLU."""
        return self.projected.B

    @property
    def C(self) -> torch.Tensor:
        """(b, T, G, N) output vectors, after conv and SiLU."""
        return self.projected.C

    @property
    def D(self) -> torch.Tensor:
        """(H,) skip weight."""
        return self.projected.D

    @cached_property
    def y(self) -> torch.Tensor:
        """fp32 (b, T, H, P): y_t = C_t . h_t + D x_t."""
        return state.scan_output(self.projected)

    @cached_property
    def ghost_sum(self) -> torch.Tensor:
        """fp64 (G, N): sum over tokens, heads of the group and p of h^2 C^2."""
        return state.ghost_sum(self.projected, self.mask)

    @cached_property
    def gramian(self) -> torch.Tensor:
        """fp64 (G, N, N): sum over tokens, heads of the group and p of h h^T."""
        return state.gramian(self.projected, self.mask)
