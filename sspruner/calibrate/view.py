"""SSMView: what a scorer sees of one module on one calibration batch. Computed on first use, shared by scorers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from itertools import combinations

import torch
from torch import nn

from sspruner.calibrate import selective, state
from sspruner.errors import PluginError
from sspruner.graph.family import Family, Projected, SelectiveProjected
from sspruner.graph.group import Block, DependencyGroup, Member


class SSMView:
    """One dependency group on one batch. Everything is read-only and in the model's dtype unless it says fp32.

    layer       module path: the mixer, attention or MLP that is observed; on the axis `block` the block
    group       the dependency group that is scored (sspruner.graph.group): groups, units, members
    unit        on the axes `block` and `mixer`: which unit this is; else None
    mask        bool (b, T): False where padding; padded positions must not enter statistics
    tokens      number of positions where mask is True
    hidden      (b, T, hidden size): the module's input
    output      (b, T, hidden size): on the axis `block`, what the block made of it
    weights     `<tensor>:<rows>` -> fp32 (groups, units, elements), the members of the scored group, e.g.
                `in_proj.weight:B` (G, N, hidden size) on the axis `state`
    gradients   the same for the gradient of the mean calibration loss; with needs="gradients"
    norms       fp32 (groups, units): L2 norm of everything that each unit owns
    x z dt A B C D   what a mixer feeds to its scan: see sspruner.graph.family, Projected and SelectiveProjected
    y           fp32 (b, T, H, P): the scan's output, before gate and norm
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str,
        group: DependencyGroup,
        mask: torch.Tensor,
        *,
        family: Family | None = None,
        hidden: torch.Tensor | None = None,
        output: torch.Tensor | None = None,
        gradients: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.layer, self.group, self.mask, self._gradients = layer, group, mask, gradients
        self._model, self._family, self._hidden, self._output = model, family, hidden, output

    @property
    def hidden(self) -> torch.Tensor:
        """(b, T, hidden size): the module's input."""
        if self._hidden is None:
            raise PluginError("a scorer with needs='weights' read activations; set needs='activations'")
        return self._hidden

    @property
    def output(self) -> torch.Tensor:
        """(b, T, hidden size): the block's output, on the axis `block`."""
        if self._output is None:
            raise PluginError("only whole blocks have an output here (axis block, needs='activations')")
        return self._output

    @cached_property
    def unit(self) -> int | None:
        """Which unit of the axes `block` and `mixer` is observed."""
        return next((i for i, block in enumerate(self.group.blocks) if block.path == self.layer), None)

    @cached_property
    def projected(self) -> Projected | SelectiveProjected:
        """x, z, dt, A, B, C, D together, as the functions of sspruner.calibrate.state and .selective take them."""
        hidden = self.hidden
        if self._family is None:
            raise PluginError(f"{self.layer} is not a mixer: it has no scan; use hidden and weights")
        with torch.no_grad():
            return self._family.project(self._model.get_submodule(self.layer), hidden, self.mask)

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        """The members of the scored group: `<tensor>:<rows>` -> fp32 (groups, units, elements)."""
        return {self._key(m): m.gather(_tensor(self._model, m.tensor)) for m in self.group.members if m.counted}

    @cached_property
    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradients of the members: `<tensor>:<rows>` -> fp32 (groups, units, elements)."""
        if self._gradients is None:
            raise PluginError("gradients were not computed; set needs='gradients'")
        return {self._key(m): m.gather(self._gradients[m.tensor]) for m in self.group.members if m.counted}

    @cached_property
    def norms(self) -> torch.Tensor:
        """fp32 (groups, units): L2 norm of everything that each unit owns."""
        if self.group.blocks:
            return torch.stack([self._own_energy(block) for block in self.group.blocks])[None].sqrt()
        energy = torch.stack([w.square().sum(-1) for w in self.weights.values()]).sum(0)
        return (energy - self._counted_twice()).clamp_min(0).sqrt()

    def _own_energy(self, block: Block) -> torch.Tensor:
        """Squares of what goes with a block: its parameters and extras, but not what other blocks share."""
        others = [b for b in self.group.blocks if b is not block]
        shared = {id(p) for b in others for p in self._model.get_submodule(b.path).parameters()}
        own = {id(p): p for p in self._model.get_submodule(block.path).parameters() if id(p) not in shared}
        own |= {id(p): p for path in block.extras for p in self._model.get_submodule(path).parameters()}
        return torch.stack([p.detach().float().square().sum() for p in own.values()]).sum()

    def _counted_twice(self) -> torch.Tensor | float:
        """Squares of elements that a unit owns by row and by column: a square matrix of the residual stream."""
        twice: torch.Tensor | float = 0.0
        for a, b in combinations([m for m in self.group.members if m.counted], 2):
            if a.tensor == b.tensor and a.dims < b.dims:
                crossing = _tensor(self._model, a.tensor).detach().float()[a.index.squeeze(-1), b.index.squeeze(-1)]
                twice = twice + crossing.square()
        return twice

    def _key(self, member: Member) -> str:
        return f"{member.tensor.removeprefix(f'{self.group.layer}.')}:{member.rows}"

    @cached_property
    def tokens(self) -> int:
        """Number of tokens that count."""
        return int(self.mask.sum())

    @property
    def x(self) -> torch.Tensor:
        """(b, T, H, P) input of the scan, after conv and SiLU; in Mamba1 (b, T, G, P)."""
        return self.projected.x

    @property
    def z(self) -> torch.Tensor:
        """(b, T, H*P) gate, before SiLU."""
        return self.projected.z

    @property
    def dt(self) -> torch.Tensor:
        """(b, T, H) step size, after softplus and clamp; in Mamba1 (b, T, G, P)."""
        return self.projected.dt

    @property
    def A(self) -> torch.Tensor:
        """(H,) decay rate, negative; in Mamba1 (G, P, N)."""
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
        """(H,) skip weight; in Mamba1 (G, P)."""
        return self.projected.D

    @cached_property
    def y(self) -> torch.Tensor:
        """fp32 (b, T, H, P): y_t = C_t . h_t + D x_t; for Mamba1 (b, T, G, P)."""
        p = self.projected
        return state.scan_output(p) if isinstance(p, Projected) else selective.scan_output(p)

    @cached_property
    def ghost_sum(self) -> torch.Tensor:
        """fp64 (G, N): sum over tokens, heads of the group and p (in Mamba1: channels) of h^2 C^2."""
        p = self.projected
        return state.ghost_sum(p, self.mask) if isinstance(p, Projected) else selective.ghost_sum(p, self.mask)

    @cached_property
    def energy_sum(self) -> torch.Tensor:
        """fp64 (G, N): sum over tokens, heads of the group and p (in Mamba1: channels) of h^2."""
        p = self.projected
        return state.energy_sum(p, self.mask) if isinstance(p, Projected) else selective.energy_sum(p, self.mask)

    @cached_property
    def output_energy(self) -> torch.Tensor:
        """fp64 (H, P): sum over tokens of y^2, for each channel of each head."""
        return (self.y.square() * self.mask[..., None, None]).sum((0, 1), dtype=torch.float64)

    @cached_property
    def gramian(self) -> torch.Tensor:
        """fp64 (G, N, N): sum over tokens, heads of the group and p of h h^T. Mamba2 only."""
        if not isinstance(self.projected, Projected):
            raise PluginError("the Gramian of a group's states is defined for Mamba2: Mamba1's decay differs by state")
        return state.gramian(self.projected, self.mask)


def _tensor(model: nn.Module, name: str) -> torch.Tensor:
    owner, _, leaf = name.rpartition(".")
    found: torch.Tensor = getattr(model.get_submodule(owner), leaf)
    return found
