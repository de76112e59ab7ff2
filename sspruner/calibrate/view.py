"""SSMView: the tensors that a scorer reads of one module on one calibration batch, computed on first use and shared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import combinations

import torch
from torch import nn

from sspruner.calibrate import scans, state
from sspruner.calibrate.gain import output_weights
from sspruner.calibrate.routing import ExpertSums, expert_sums, routed
from sspruner.errors import PluginError
from sspruner.graph.family import DeltaProjected, Family, Scan, SelectiveProjected
from sspruner.graph.group import Block, DependencyGroup


class Observation:
    """One module on one batch, or its weights alone; shared by all scorers and dependency groups that read it.

    layer    path of the module; inside a shared block the path of this call, where `site` is the first path
    inputs   function that returns the inputs of the linear layers inside the module, by their relative paths
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str,
        mask: torch.Tensor,
        *,
        site: str | None = None,
        family: Family | None = None,
        hidden: torch.Tensor | None = None,
        output: torch.Tensor | None = None,
        inputs: Callable[[], dict[str, torch.Tensor]] | None = None,
    ) -> None:
        self.model, self.layer, self.mask, self.site = model, layer, mask, site or layer
        self._family, self._hidden, self._output, self._inputs = family, hidden, output, inputs

    @property
    def hidden(self) -> torch.Tensor:
        """Input of the module: (b, T, hidden size)."""
        if self._hidden is None:
            raise PluginError("a scorer that does not need activations read them; set needs='activations'")
        return self._hidden

    @property
    def output(self) -> torch.Tensor:
        """Output of a whole block: (b, T, hidden size)."""
        if self._output is None:
            raise PluginError("only whole blocks have an output here (axis block, needs='activations')")
        return self._output

    @cached_property
    def tokens(self) -> int:
        """Number of tokens that are not padding."""
        return int(self.mask.sum())

    @cached_property
    def inputs(self) -> dict[str, torch.Tensor]:
        """Full name of a linear layer's weight -> fp32 (tokens, in features), without padding."""
        if isinstance(self.model.get_submodule(self.layer), nn.Linear):
            given = {"": self.hidden}
        elif self._inputs is None:
            raise PluginError("a scorer that does not need activations read them; set needs='activations'")
        else:
            given = {f".{path}": value for path, value in self._inputs().items()}
        return {f"{self.site}{path}.weight": self._counted(value).float() for path, value in given.items()}

    def _counted(self, value: torch.Tensor) -> torch.Tensor:
        """Return (tokens, features) without padding. If a router has selected tokens, all of them are returned."""
        if value.shape[:-1] == self.mask.shape:
            return value[self.mask]
        flat = value.reshape(-1, value.shape[-1])
        return flat[self.mask.flatten()] if len(flat) == self.mask.numel() else flat

    @cached_property
    def projected(self) -> Scan:
        """Inputs of the mixer's scan."""
        hidden = self.hidden
        if self._family is None:
            raise PluginError(f"{self.layer} is not a mixer: it has no scan; use hidden and weights")
        with torch.no_grad():
            return self._family.project(self.model.get_submodule(self.layer), hidden, self.mask)

    @cached_property
    def routing(self) -> ExpertSums:
        """See SSMView.routing."""
        hidden, module = self.hidden, self.model.get_submodule(self.layer)
        if not hasattr(module, "experts"):
            raise PluginError(f"{self.layer} has no experts: it has no routing; use hidden and weights")
        return expert_sums(module.experts, routed(module, hidden, self.mask))

    @cached_property
    def y(self) -> torch.Tensor:
        """Output of the scan, before gate and norm."""
        return scans.scan_output(self.projected)

    @cached_property
    def ghost_sum(self) -> torch.Tensor:
        """See SSMView.ghost_sum."""
        return scans.ghost_sum(self.projected, self.mask)

    @cached_property
    def energy_sum(self) -> torch.Tensor:
        """See SSMView.energy_sum."""
        return scans.energy_sum(self.projected, self.mask)

    @cached_property
    def output_energy(self) -> torch.Tensor:
        """See SSMView.output_energy."""
        return (self.y.square() * self.mask[..., None, None]).sum((0, 1), dtype=torch.float64)

    @cached_property
    def gramian(self) -> torch.Tensor:
        """See SSMView.gramian."""
        return state.gramian(self._one_decay(), self.mask)

    @cached_property
    def weighted_gramian(self) -> torch.Tensor:
        """See SSMView.weighted_gramian."""
        return state.weighted_gramian(self._one_decay(), self.output_weights, self.mask)

    def _one_decay(self) -> state.Scalar:
        p = self.projected
        if isinstance(p, SelectiveProjected) or (isinstance(p, DeltaProjected) and p.decay.ndim == 4):
            raise PluginError(
                "the Gramian of a group's states is defined where they share a decay: not in Mamba1, nor KDA"
            )
        return p

    @cached_property
    @torch.no_grad()
    def output_weights(self) -> torch.Tensor:
        """See SSMView.output_weights."""
        family, mixer, z = self._mixer_family(), self.model.get_submodule(self.site), self.projected.z
        channels = self.y.flatten(2).shape[-1]
        out_proj = _tensor(self.model, f"{self.site}.{family.out}.weight").float()[:, -channels:]
        norm = getattr(getattr(mixer, family.norm, None), "weight", None)
        gate = family.gate(mixer, z)
        if norm is None:
            return output_weights(self.y, gate, out_proj)
        heads = channels // norm.numel()  # a norm whose weight all heads share averages over one head
        runs = heads if heads > 1 else self.projected.B.shape[2]
        return output_weights(self.y, gate, out_proj, norm.float().repeat(heads), self._given(channels), runs)

    def _mixer_family(self) -> Family:
        assert self._family is not None
        return self._family

    def _given(self, channels: int) -> torch.Tensor:
        """Return the part of out_proj's input that comes from the scan: fp32 (b, T, D); zeros at padding."""
        known = self._mixer_family().readout(self.model.get_submodule(self.layer), self.y, self.projected.z)
        if known is not None:
            return known
        given = self.y.new_zeros(*self.mask.shape, channels)
        given[self.mask] = self.inputs[f"{self.site}.{self._mixer_family().out}.weight"][:, -channels:]
        return given


class SSMView:
    """One dependency group on one batch, as a scorer reads it.

    Read-only, and in the model's dtype unless fp32 is stated.

    layer       module path: the mixer, attention or MLP that is observed; on the axis `block` the block, on the axis
                `weight` the linear layer
    group       the dependency group that is scored (sspruner.graph.group): groups, units, members
    unit        on the axes `block` and `mixer`: index of the observed unit; else None
    mask        bool (b, T): False where padding; padded positions must not enter statistics
    tokens      number of positions where mask is True
    hidden      (b, T, hidden size): the module's input
    output      (b, T, hidden size): on the axis `block`, the block's output
    inputs      `<tensor>` -> fp32 (tokens, in features): the input of each linear layer inside the module
    weights     `<tensor>:<rows>` -> fp32 (groups, units, elements), the members of the scored group, e.g.
                `in_proj.weight:B` (G, N, hidden size) on the axis `state`; of single elements `weight` (out, in, 1)
    gradients   gradient of the mean calibration loss, with the keys and shapes of weights; with needs="gradients"
    fisher      mean over sequences of the squared gradient, with the keys and shapes of weights; with needs="fisher"
    norms       fp32 (groups, units): L2 norm of all parameters of each unit
    routing     in mixtures of experts, sums over the tokens of each expert: see sspruner.calibrate.routing, ExpertSums
    x z dt A B C D   inputs of the mixer's scan: see sspruner.graph.family, Projected and SelectiveProjected; of a delta
                rule (DeltaProjected) x is v, dt beta, B k and C q, and there is neither A nor D
    y           fp32 (b, T, H, P): the scan's output, before gate and norm
    """

    def __init__(
        self,
        observation: Observation,
        group: DependencyGroup,
        *,
        gradients: Mapping[str, torch.Tensor] | None = None,
        fisher: Mapping[str, torch.Tensor] | None = None,
        loss: Callable[[Sequence[int]], float] | None = None,
    ) -> None:
        self.observation, self.group, self.layer, self.mask = observation, group, observation.layer, observation.mask
        self._model, self._gradients, self._fisher, self._loss = observation.model, gradients, fisher, loss

    @property
    def hidden(self) -> torch.Tensor:
        """(b, T, hidden size): the module's input."""
        return self.observation.hidden

    @property
    def output(self) -> torch.Tensor:
        """(b, T, hidden size): the block's output, on the axis `block`."""
        return self.observation.output

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """`<tensor>` -> fp32 (tokens, in features), for each linear layer inside the module; padding left out."""
        return {self.group.key(name): value for name, value in self.observation.inputs.items()}

    @cached_property
    def unit(self) -> int | None:
        """Index of the observed unit on the axes `block` and `mixer`, else None."""
        return next((i for i, block in enumerate(self.group.blocks) if block.path == self.layer), None)

    def loss(self, units: Sequence[int]) -> float:
        """Return the mean loss, in nats per predicted token, with these units of the axis `block` or `mixer` masked."""
        if self._loss is None:
            raise PluginError("the loss was not asked for; set needs='loss' (axes block and mixer)")
        return self._loss(units)

    def tensor(self, key: str) -> torch.Tensor:
        """Return a whole parameter by its key, such as `out_proj.weight`, as an fp32 copy."""
        return _tensor(self._model, f"{self.group.layer}.{key}").detach().float().clone()

    def has(self, key: str) -> bool:
        """Return whether the module has a parameter with this key."""
        path, _, leaf = f"{self.group.layer}.{key}".rpartition(".")
        try:
            return getattr(self._model.get_submodule(path), leaf, None) is not None
        except AttributeError:
            return False

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        """The members of the scored group: `<tensor>:<rows>` -> fp32 (groups, units, elements)."""
        return self._gather(lambda name: _tensor(self._model, name).detach())

    @cached_property
    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradients of the members: `<tensor>:<rows>` -> fp32 (groups, units, elements)."""
        if self._gradients is None:
            raise PluginError("gradients were not computed; set needs='gradients'")
        return self._gather(self._gradients.__getitem__)

    @cached_property
    def fisher(self) -> dict[str, torch.Tensor]:
        """Mean over sequences of the squared gradient: `<tensor>:<rows>` -> fp32 (groups, units, elements)."""
        if self._fisher is None:
            raise PluginError("squared gradients were not computed; set needs='fisher'")
        return self._gather(self._fisher.__getitem__)

    def _gather(self, tensor: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        names = [self.group.tensor] if self.group.tensor else [m.tensor for m in self.group.members if m.counted]
        return self.group.gather({self.group.key(name): tensor(name) for name in names})

    @cached_property
    def norms(self) -> torch.Tensor:
        """fp32 (groups, units): L2 norm of all parameters of each unit."""
        if self.group.blocks:
            return torch.stack([self._block_energy(block) for block in self.group.blocks])[None].sqrt()
        energy = torch.stack([w.square().sum(-1) for w in self.weights.values()]).sum(0)
        return (energy - self._overlap_energy()).clamp_min(0).sqrt()

    def _block_energy(self, block: Block) -> torch.Tensor:
        """Sum the squares of the parameters removed with a block, without those that other blocks share."""
        others = [b for b in self.group.blocks if b is not block]
        shared = {id(p) for b in others for p in self._model.get_submodule(b.path).parameters()}
        owned = {id(p): p for p in self._model.get_submodule(block.path).parameters() if id(p) not in shared}
        owned |= {id(p): p for path in block.extras for p in self._model.get_submodule(path).parameters()}
        return torch.stack([p.detach().float().square().sum() for p in owned.values()]).sum()

    def _overlap_energy(self) -> torch.Tensor | float:
        """Sum the squares of elements that a unit owns by row and by column (square matrices of the residual width)."""
        overlap: torch.Tensor | float = 0.0
        for a, b in combinations([m for m in self.group.members if m.counted], 2):
            if a.tensor == b.tensor and a.dims < b.dims:
                crossing = _tensor(self._model, a.tensor).detach().float()[a.index.squeeze(-1), b.index.squeeze(-1)]
                overlap = overlap + crossing.square()
        return overlap

    @property
    def tokens(self) -> int:
        """Number of tokens that are not padding."""
        return self.observation.tokens

    @property
    def routing(self) -> ExpertSums:
        """In a mixture of experts: sums over the tokens of each expert (sspruner.calibrate.routing), fp64 (E,) each."""
        return self.observation.routing

    @property
    def projected(self) -> Scan:
        """x, z, dt, A, B, C, D together, as the functions of sspruner.calibrate.state and .selective take them."""
        return self.observation.projected

    @property
    def x(self) -> torch.Tensor:
        """(b, T, H, P) input of the scan, after conv and SiLU; in Mamba1 (b, T, G, P)."""
        return self.projected.x

    @property
    def z(self) -> torch.Tensor:
        """(b, T, H*P) gate, before its activation."""
        return self.projected.z

    @property
    def dt(self) -> torch.Tensor:
        """(b, T, H) step size, after softplus and clamp; in Mamba1 (b, T, G, P)."""
        return self.projected.dt

    @property
    def A(self) -> torch.Tensor:
        """(H,) decay rate, negative; in Mamba1 (G, P, N). A delta rule has none: see projected.decay."""
        return self._of_scan("A")

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
        """(H,) skip weight; in Mamba1 (G, P). A delta rule has none."""
        return self._of_scan("D")

    def _of_scan(self, name: str) -> torch.Tensor:
        if not hasattr(self.projected, name):
            raise PluginError(f"{self.layer} is a delta rule: it has no {name}")
        value: torch.Tensor = getattr(self.projected, name)
        return value

    @property
    def y(self) -> torch.Tensor:
        """fp32 (b, T, H, P): y_t = C_t . h_t + D x_t; for Mamba1 (b, T, G, P)."""
        return self.observation.y

    @property
    def ghost_sum(self) -> torch.Tensor:
        """fp64 (G, N): sum over tokens, heads of the group and p (in Mamba1: channels) of h^2 C^2."""
        return self.observation.ghost_sum

    @property
    def energy_sum(self) -> torch.Tensor:
        """fp64 (G, N): sum over tokens, heads of the group and p (in Mamba1: channels) of h^2."""
        return self.observation.energy_sum

    @property
    def output_energy(self) -> torch.Tensor:
        """fp64 (H, P): sum over tokens of y^2, for each channel of each head."""
        return self.observation.output_energy

    def by_unit(self, channels: torch.Tensor) -> torch.Tensor:
        """Sum values of y's channels, (H, P), over the channels of each unit of the scored group: (groups, units)."""
        columns = [m for m in self.group.members if m.dims == (1,)][
            -1
        ].index  # those that read y, of the output projection
        first = columns.min()  # in native mixers with a gated MLP the columns of that come before
        return channels.flatten()[(columns - first).to(channels.device)].sum(-1)

    @property
    def gramian(self) -> torch.Tensor:
        """fp64 (G, N, N): sum over tokens, heads of the group and p of h h^T. Not in Mamba1."""
        return self.observation.gramian

    @property
    def weighted_gramian(self) -> torch.Tensor:
        """fp64 (G, N, N): sum over tokens, heads of the group and p of w h h^T, w the output_weights. Not in Mamba1."""
        return self.observation.weighted_gramian

    @property
    def observability(self) -> torch.Tensor:
        """fp64 (G, N, N): sum over tokens of C C^T."""
        return state.observability(self.C, self.mask)

    @property
    def output_weights(self) -> torch.Tensor:
        """fp32 (b, T, H, P), in Mamba1 (b, T, G, P): squared gain from y to the mixer's output (calibrate/gain.py)."""
        return self.observation.output_weights


def _tensor(model: nn.Module, name: str) -> torch.Tensor:
    owner, _, leaf = name.rpartition(".")
    value: torch.Tensor = getattr(model.get_submodule(owner), leaf)
    return value
