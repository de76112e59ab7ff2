"""Where the rows of one module live, as data: every axis of a family follows from its Layout.

A layout gives names to dimensions (`group`, `head`, `head_dim`, `state`) and says, for each tensor, which runs
of rows are a row-major product of which dimensions. For a Mamba2 mixer with one group of two heads:

    in_proj.weight, dim 0:  z (group, head, head_dim) | x (group, head, head_dim) | B (group, state) | ...

To cut the axis `state` is to drop index n of the dimension `state` wherever it occurs; the index maps, the
number of parameters and the attributes to correct are all computed from the layout, here, once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import nn

from sspruner.graph.group import DependencyGroup, Member

ENCODE, DECODE = "state_encode", "state_decode"  # of a mixer whose state has coordinates of its own
Dims = tuple[str, ...]
Size = tuple[Dims, ...]  # a sum of products of dimensions


@dataclass(frozen=True)
class Rows:
    """A run of consecutive rows of a tensor: the row-major product of the dimensions `dims`."""

    name: str
    dims: Dims


@dataclass(frozen=True)
class Slot:
    """One tensor of a module: `tensor` (a parameter or buffer, relative to the module) is made of `rows` along `dim`.

    dim     a dimension of the tensor; or several, seen as one in that order, where rows differ by head in a tensor
            (head, rows, ...). The leading ones are then only indices: they have a slot of their own to be cut in
    outer   dimensions around the runs: for each index of `outer` all the runs follow one another (interleaved rows)
    """

    tensor: str
    dim: int | tuple[int, ...]
    rows: tuple[Rows, ...]
    outer: Dims = ()

    @property
    def tensor_dims(self) -> tuple[int, ...]:
        """`dim` as a tuple."""
        return (self.dim,) if isinstance(self.dim, int) else self.dim

    def cuts(self, axis: str, rows: Rows) -> bool:
        """Whether dropping units of `axis` drops rows of this run here."""
        return axis in rows.dims or (axis in self.outer and len(self.tensor_dims) == 1)


@dataclass(frozen=True)
class Fold:
    """What a slice must do to the values that stay, so that sliced = masked.

    A norm over the cut units divides by fewer of them after the cut. With f = before / after of the dimensions
    `over`, `target` is multiplied by f ** power: a tensor (only its run `rows`, if given) or a float attribute.
    An RMS norm with its own weight needs weight *= sqrt(f), eps *= f.
    """

    target: str
    over: Dims
    power: float
    rows: str | None = None


@dataclass(frozen=True)
class Layout:
    """All that has to be said about one module.

    sizes       size of each named dimension
    slots       the tensors that have such dimensions; a slot whose tensor the module lacks is skipped
    axes        the dimensions that may be cut, each with the dimensions it is nested in: its groups
    state       the dimensions of the recurrent state of one sequence
    attributes  integers that the module's forward reads: attribute path -> a sum of products of dimensions; one that
                the module lacks is skipped
    folds       corrections of the values that stay
    """

    sizes: Mapping[str, int]
    slots: tuple[Slot, ...]
    axes: Mapping[str, Dims] = field(default_factory=dict)
    state: Dims = ()
    attributes: Mapping[str, Size] = field(default_factory=dict)
    folds: tuple[Fold, ...] = ()

    def count(self, dims: Dims) -> int:
        """Product of the sizes of `dims`."""
        return prod(self.sizes[d] for d in dims)

    def total(self, size: Size) -> int:
        """A sum of products of dimensions as a number."""
        return sum(self.count(term) for term in size)

    def resized(self, sizes: Mapping[str, int]) -> Layout:
        """The same layout after a cut: `sizes` replaces the sizes of the dimensions it names."""
        return replace(self, sizes={**self.sizes, **sizes})

    def projected(self, size: int) -> Layout:
        """The same layout with a recurrent state of `size` coordinates of its own, a basis, beside rows that stay.

        What was `state` is then `row`: the rows that make B and C. encode (group, state, row) reads them into the
        state, decode (group, row, state) reads the state out.
        """
        if self.is_projected:
            return self.resized({"state": size})
        groups, state = ("group",), ("state",)
        return replace(
            self,
            sizes={**self.sizes, "row": self.sizes["state"], "state": size},
            slots=(
                *(replace(s, rows=tuple(Rows(r.name, self.row_dims(r.dims)) for r in s.rows)) for s in self.slots),
                Slot(ENCODE, 0, (Rows("group", groups),)),
                Slot(ENCODE, (0, 1), (Rows("encode", state),), outer=groups),
                Slot(DECODE, 0, (Rows("group", groups),)),
                Slot(DECODE, (0, 2), (Rows("decode", state),), outer=groups),
            ),
            attributes={a: tuple(map(self.row_dims, size)) for a, size in self.attributes.items()},
        )

    @property
    def is_projected(self) -> bool:
        """Whether the state has coordinates of its own."""
        return "row" in self.sizes

    def stock_total(self, size: Size) -> int:
        """The value of a config's field: where the state has coordinates of its own, its `state` is the rows."""
        return self.total(tuple(map(self.row_dims, size)) if self.is_projected else size)

    @staticmethod
    def row_dims(dims: Dims) -> Dims:
        """Dimensions in a projected layout, of what is sized by the rows of B and C, not by the state."""
        return tuple("row" if d == "state" else d for d in dims)

    def rows_of(self, slot: Slot, rows: Rows) -> torch.Tensor:
        """Row numbers of one run, in the shape of its dimensions: int64 (*outer, *rows.dims), on the CPU."""
        before = sum(self.count(r.dims) for r in slot.rows[: slot.rows.index(rows)])
        width = sum(self.count(r.dims) for r in slot.rows)
        # The device is named because the loader cuts inside `torch.device("meta")`.
        outer = torch.arange(self.count(slot.outer), device="cpu") * width + before
        inner = torch.arange(self.count(rows.dims), device="cpu")
        return (outer[:, None] + inner).reshape([self.sizes[d] for d in slot.outer + rows.dims])

    def index_map(self, slot: Slot, rows: Rows, axis: str, groups: Dims) -> torch.Tensor:
        """Rows of `slot` that each unit of `axis` owns: int64 (groups, units, rows per unit)."""
        dims = slot.outer + rows.dims
        order = [*groups, axis, *[d for d in dims if d != axis and d not in groups]]
        index = self.rows_of(slot, rows).permute([dims.index(d) for d in order])
        return index.reshape(self.count(groups), self.sizes[axis], -1)


#: Bytes per element of the recurrent state: transformers keeps it in fp32, whatever the weights. mamba_ssm's caches
#: take a dtype; their bytes are counted as fp32, too.
STATE_ITEMSIZE = 4


def state_bytes(layout: Layout) -> int:
    """Bytes of recurrent state that one sequence keeps in this mixer at decode."""
    return layout.count(layout.state) * STATE_ITEMSIZE if layout.state else 0


def members(layout: Layout, module: nn.Module, path: str, axis: str, groups: Dims) -> list[Member]:
    """Every tensor slice of the module at `path` that the units of `axis` own."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    tensors: dict[str, torch.Tensor] = {**parameters, **dict(module.named_buffers(remove_duplicate=False))}
    found = []
    for slot in layout.slots:
        if slot.tensor not in tensors:
            continue
        tensor = tensors[slot.tensor]
        for rows in slot.rows:
            if slot.cuts(axis, rows):
                extent = prod([int(tensor.shape[d]) for d in slot.tensor_dims])
                found.append(
                    Member(
                        tensor=f"{path}.{slot.tensor}",
                        dims=slot.tensor_dims,
                        rows=rows.name,
                        index=layout.index_map(slot, rows, axis, groups),
                        row_size=tensor.numel() // extent,
                        counted=slot.tensor in parameters,
                    )
                )
    return found


def dependency_group(layout: Layout, module: nn.Module, path: str, axis: str) -> DependencyGroup:
    """The dependency group of `axis` in the module at `path`: every member that one unit owns."""
    groups = layout.axes[axis]
    sets, units = layout.count(groups), layout.sizes[axis]
    return DependencyGroup(
        layer=path,
        axis=axis,
        groups=sets,
        units=units,
        members=tuple(members(layout, module, path, axis, groups)),
        state_bytes_per_unit=state_bytes(layout) // (sets * units) if axis in layout.state else 0,
    )
