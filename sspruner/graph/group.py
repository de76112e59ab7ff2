"""Dependency groups: all the tensor slices of one layer that must be cut together along one axis."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch


@dataclass(frozen=True)
class Fold:
    """What a slice must do to the values that stay, so that sliced = masked.

    An RMS norm over the cut units divides by fewer of them after the cut. With the factor f = before / after,
    `weight *= sqrt(f)` and `eps *= f` restore the masked result exactly. The member that carries the fold is the
    norm's weight; `eps` is the path of its epsilon, relative to the layer.
    """

    eps: str


@dataclass(frozen=True)
class Member:
    """A tensor slice that the units of a group own.

    index: int64 (groups, units, rows per unit) on the CPU, rows of `parameter` along `dim`.
    row_size: number of elements in one such row.
    """

    parameter: str
    dim: int
    rows: str
    index: torch.Tensor
    row_size: int
    fold: Fold | None = None

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The member's values, unit by unit: (groups, units, elements per unit), fp32."""
        groups, units, _ = self.index.shape
        rows = tensor.detach().index_select(self.dim, self.index.flatten().to(tensor.device))
        return rows.movedim(self.dim, 0).reshape(groups, units, -1).float()


@dataclass(frozen=True)
class DependencyGroup:
    """One layer x one axis: `groups` sets of `units` units, cut together in every member.

    Constraint: every set keeps the same number of units (`keep` index sets may differ between sets, counts may
    not), because the model's forward reshapes a flat dimension by them.
    """

    layer: str
    axis: str
    groups: int
    units: int
    members: tuple[Member, ...]
    state_bytes_per_unit: int
    sizes: dict[str, int]
    attributes: dict[str, tuple[tuple[str, ...], ...]]

    @property
    def name(self) -> str:
        """`<module path>:<axis>`, the key used in plans and score files."""
        return f"{self.layer}:{self.axis}"

    @property
    def parameters_per_unit(self) -> int:
        """Number of parameters that leave the model with one unit."""
        return sum(m.index.shape[2] * m.row_size for m in self.members)

    def attribute_values(self, after: int) -> dict[str, int]:
        """The mixer's integer attributes once `after` units are kept in every set."""
        sizes = self.sizes | {self.axis: after}
        return {name: sum(prod(sizes[d] for d in term) for term in terms) for name, terms in self.attributes.items()}
