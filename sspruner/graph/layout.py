"""Where the rows of one mixer live, as data: every axis of a family follows from its Layout.

A layout gives names to dimensions (`group`, `head`, `head_dim`, `state`) and says, for each tensor, which runs
of rows are a row-major product of which dimensions. For a Mamba2 mixer with one group of two heads:

    in_proj.weight, dim 0:  z (group, head, head_dim) | x (group, head, head_dim) | B (group, state) | ...

To cut the axis `state` is to drop index n of the dimension `state` wherever it occurs; the index maps, the
number of parameters and the attributes to correct are all computed from the layout, here, once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import torch
from torch import nn

from sspruner.graph.group import DependencyGroup, Fold, Member


@dataclass(frozen=True)
class Rows:
    """A run of consecutive rows of a tensor: the row-major product of the dimensions `dims`."""

    name: str
    dims: tuple[str, ...]


@dataclass(frozen=True)
class Slot:
    """One tensor of a mixer: `parameter` (relative to the mixer) is made of `rows` along `dim`."""

    parameter: str
    dim: int
    rows: tuple[Rows, ...]
    fold: Fold | None = None


@dataclass(frozen=True)
class Layout:
    """All that a family has to say about one mixer.

    sizes       size of each named dimension
    slots       the tensors that have such dimensions; a slot whose parameter is None in the mixer is skipped
    axes        the dimensions that may be cut, each with the dimensions it is nested in: its groups
    state       the dimensions of the recurrent state of one sequence
    attributes  integers that the mixer's forward reads: attribute path -> a sum of products of dimensions
    """

    sizes: dict[str, int]
    slots: tuple[Slot, ...]
    axes: dict[str, tuple[str, ...]]
    state: tuple[str, ...]
    attributes: dict[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)

    def count(self, dims: tuple[str, ...]) -> int:
        """Product of the sizes of `dims`."""
        return prod(self.sizes[d] for d in dims)

    def index_map(self, slot: Slot, rows: Rows, axis: str) -> torch.Tensor:
        """Rows of `slot` that each unit of `axis` owns: int64 (groups, units, rows per unit)."""
        offset = sum(self.count(r.dims) for r in slot.rows[: slot.rows.index(rows)])
        at = rows.dims.index(axis)
        shape = (self.count(rows.dims[:at]), self.sizes[axis], self.count(rows.dims[at + 1 :]))
        # The device is named because the loader cuts inside `torch.device("meta")`.
        return (torch.arange(prod(shape), device="cpu") + offset).reshape(shape)


#: Bytes per element of the recurrent state: transformers and mamba_ssm keep it in fp32, whatever the weights.
STATE_ITEMSIZE = 4


def state_bytes(layout: Layout) -> int:
    """Bytes of recurrent state that one sequence keeps in this mixer at decode."""
    return layout.count(layout.state) * STATE_ITEMSIZE


def dependency_group(layout: Layout, mixer: nn.Module, path: str, axis: str) -> DependencyGroup:
    """The dependency group of `axis` in the mixer at `path`: every member that one unit owns."""
    parameters = dict(mixer.named_parameters(remove_duplicate=False))
    members = []
    for slot in layout.slots:
        tensor = parameters.get(slot.parameter)
        if tensor is None:
            continue
        for rows in slot.rows:
            if axis in rows.dims:
                members.append(
                    Member(
                        parameter=f"{path}.{slot.parameter}",
                        dim=slot.dim,
                        rows=rows.name,
                        index=layout.index_map(slot, rows, axis),
                        row_size=tensor.numel() // tensor.shape[slot.dim],
                        fold=slot.fold,
                    )
                )
    groups, units = layout.count(layout.axes[axis]), layout.sizes[axis]
    return DependencyGroup(
        layer=path,
        axis=axis,
        groups=groups,
        units=units,
        members=tuple(members),
        state_bytes_per_unit=state_bytes(layout) // (groups * units) if axis in layout.state else 0,
        sizes=layout.sizes,
        attributes={name: terms for name, terms in layout.attributes.items() if any(axis in term for term in terms)},
    )
