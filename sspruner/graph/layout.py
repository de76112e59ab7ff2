"""Layout: for each tensor of a module, which rows belong to which dimension, as data.

A layout names the dimensions of a module (`group`, `head`, `head_dim`, `state`) and describes each tensor as runs of
rows, each a row-major product of dimensions. For a Mamba2 mixer with one group of two heads:

    in_proj.weight, dim 0:  z (group, head, head_dim) | x (group, head, head_dim) | B (group, state) | ...

Cutting the axis `state` drops index n of the dimension `state` wherever it occurs. Index maps, parameter counts and
the attributes to correct are all computed from the layout, in this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod

import torch
from torch import nn

from sspruner.graph.group import ZERO, DependencyGroup, Gain, Member

ENCODE, DECODE = "state_encode", "state_decode"  # parameters of a mixer with a projected state
Dims = tuple[str, ...]
Size = tuple[Dims, ...]  # a sum of products of dimensions
Place = tuple[tuple[int, ...], tuple[int, ...], int, int]  # of a run: sizes of outer and own dims, period, first row


@dataclass(frozen=True)
class Rows:
    """Run of consecutive rows of a tensor: the row-major product of the dimensions `dims`."""

    name: str
    dims: Dims


@dataclass(frozen=True)
class Slot:
    """Tensor of a module (parameter or buffer, named relative to the module) that consists of `rows` along `dim`.

    dim     dimension of the tensor; or several, flattened in that order, where rows differ by head in a tensor
            (head, rows, ...). Then the leading ones are only indices, and another slot cuts them
    outer   dimensions around the runs: all runs are repeated for each index of `outer` (interleaved rows)
    mask    what a mask makes of the rows of dropped units (graph.group): zero, unless a choice depends on them
    """

    tensor: str
    dim: int | tuple[int, ...]
    rows: tuple[Rows, ...]
    outer: Dims = ()
    mask: str = ZERO

    @property
    def tensor_dims(self) -> tuple[int, ...]:
        """`dim` as a tuple."""
        return (self.dim,) if isinstance(self.dim, int) else self.dim

    def cuts(self, axis: str, rows: Rows) -> bool:
        """Return whether dropping units of `axis` drops rows of this run."""
        return axis in rows.dims or (axis in self.outer and len(self.tensor_dims) == 1)


@dataclass(frozen=True)
class Fold:
    """Correction of the values that stay after a slice, so that the sliced model equals the masked one.

    After the cut, a norm divides by fewer units. With f = before / after of the dimensions `over`, `target` is
    multiplied by f ** power. `target` is a tensor (only its run `rows`, if set) or a float attribute; with an `offset`,
    target + offset is multiplied. An RMS norm with a weight of its own needs weight *= sqrt(f), eps *= f; one that
    multiplies by 1 + weight needs the offset 1.
    """

    target: str
    over: Dims
    power: float
    rows: str | None = None
    offset: float = 0.0


@dataclass(frozen=True)
class Counts:
    """Numbers of units of one axis with which a module's code runs: multiples, no fewer than `least`, and why."""

    multiple_of: int = 1
    least: int = 1
    why: str = ""


@dataclass(frozen=True)
class Layout:
    """Description of one module: its dimensions, tensors, axes and the attributes that depend on them.

    sizes       size of each named dimension
    slots       tensors with such dimensions; a slot whose tensor the module lacks is skipped
    axes        dimensions that may be cut, each with the dimensions it is nested in (its groups)
    state       dimensions of the recurrent state of one sequence
    attributes  integers that the module's forward reads: attribute path -> a sum of products of dimensions; attributes
                that the module lacks are skipped
    folds       corrections of the values that stay
    gains       axis -> (tensor, matrix): factors by unit that all its sets share, and the matrix that reads the units
                and takes them up where sets keep other units (graph.group.Gain)
    counts      numbers of units in every set with which the module's code runs, for axes on which not all do
    """

    sizes: Mapping[str, int]
    slots: tuple[Slot, ...]
    axes: Mapping[str, Dims] = field(default_factory=dict)
    state: Dims = ()
    attributes: Mapping[str, Size] = field(default_factory=dict)
    folds: tuple[Fold, ...] = ()
    gains: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    counts: Mapping[str, Counts] = field(default_factory=dict)

    def count(self, dims: Dims) -> int:
        """Return the product of the sizes of `dims`."""
        return prod(self.sizes[d] for d in dims)

    def total(self, size: Size) -> int:
        """Evaluate a sum of products of dimensions."""
        return sum(self.count(term) for term in size)

    def has(self, size: Size) -> bool:
        """Return whether the layout has every dimension of a sum of products."""
        return all(d in self.sizes for term in size for d in term)

    def resized(self, sizes: Mapping[str, int]) -> Layout:
        """Return this layout with the sizes of some dimensions replaced."""
        return replace(self, sizes={**self.sizes, **sizes})

    def projected(self, size: int) -> Layout:
        """Return this layout for a state projected to `size` coordinates.

        The dimension `state` of B and C is renamed to `row` and keeps its size. encode (group, state, row) maps B into
        the projected state, decode (group, row, state) maps it back for C.
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
            folds=tuple(replace(fold, over=self.row_dims(fold.over)) for fold in self.folds),
        )

    @property
    def is_projected(self) -> bool:
        """True if the state is projected to another basis."""
        return "row" in self.sizes

    def stock_total(self, size: Size) -> int:
        """Return the value of a config field. If the state is projected, `state` means the rows of B and C."""
        return self.total(tuple(map(self.row_dims, size)) if self.is_projected else size)

    @staticmethod
    def row_dims(dims: Dims) -> Dims:
        """Replace `state` by `row`, for dimensions sized by the rows of B and C in a projected layout."""
        return tuple("row" if d == "state" else d for d in dims)

    def rows_of(self, slot: Slot, rows: Rows) -> torch.Tensor:
        """Return the row numbers of one run in the shape of its dimensions: int64 (*outer, *rows.dims), on the CPU.

        Equal runs of all layers share one tensor: do not change it.
        """
        return _row_numbers(*self._place(slot, rows))

    def index_map(self, slot: Slot, rows: Rows, axis: str, groups: Dims) -> torch.Tensor:
        """Return the rows of `slot` that belong to each unit of `axis`: int64 (groups, units, rows per unit).

        Equal runs of all layers share one tensor: do not change it.
        """
        dims = slot.outer + rows.dims
        order = (*groups, axis, *(d for d in dims if d != axis and d not in groups))
        shape = (self.count(groups), self.sizes[axis], -1)
        return _index_map(self._place(slot, rows), tuple(map(dims.index, order)), shape)

    def _place(self, slot: Slot, rows: Rows) -> Place:
        before = sum(self.count(r.dims) for r in slot.rows[: slot.rows.index(rows)])
        width = sum(self.count(r.dims) for r in slot.rows)
        return self._shape(slot.outer), self._shape(rows.dims), width, before

    def _shape(self, dims: Dims) -> tuple[int, ...]:
        return tuple(self.sizes[d] for d in dims)


@lru_cache(maxsize=512)
def _row_numbers(outer: tuple[int, ...], inner: tuple[int, ...], width: int, before: int) -> torch.Tensor:
    with torch.inference_mode(False):  # autograd may use it later, though a model was traced in inference mode
        # The device is explicit because the loader cuts inside `torch.device("meta")`.
        first = torch.arange(prod(outer), device="cpu") * width + before
        return (first[:, None] + torch.arange(prod(inner), device="cpu")).reshape(outer + inner)


@lru_cache(maxsize=512)
def _index_map(place: Place, order: tuple[int, ...], shape: tuple[int, int, int]) -> torch.Tensor:
    with torch.inference_mode(False):
        return _row_numbers(*place).permute(order).reshape(shape)


#: Bytes per element of the recurrent state: transformers keeps it in fp32, whatever the weights. mamba_ssm's caches
#: take a dtype; their bytes are counted as fp32, too.
STATE_ITEMSIZE = 4


def state_bytes(layout: Layout) -> int:
    """Return the bytes of recurrent state that one sequence keeps in this mixer during decoding."""
    return layout.count(layout.state) * STATE_ITEMSIZE if layout.state else 0


def members(layout: Layout, module: nn.Module, path: str, axis: str, groups: Dims) -> list[Member]:
    """Return every tensor slice of the module at `path` that belongs to the units of `axis`."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    tensors: dict[str, torch.Tensor] = {**parameters, **dict(module.named_buffers(remove_duplicate=False))}
    shared, _ = layout.gains.get(axis, ("", ""))
    slices = []
    for slot in layout.slots:
        if slot.tensor not in tensors or slot.tensor == shared:
            continue
        tensor = tensors[slot.tensor]
        for rows in slot.rows:
            if slot.cuts(axis, rows):
                extent = prod([int(tensor.shape[d]) for d in slot.tensor_dims])
                slices.append(
                    Member(
                        tensor=f"{path}.{slot.tensor}",
                        dims=slot.tensor_dims,
                        rows=rows.name,
                        index=layout.index_map(slot, rows, axis, groups),
                        row_size=tensor.numel() // extent,
                        counted=slot.tensor in parameters,
                        mask=slot.mask,
                    )
                )
    return slices


def dependency_group(layout: Layout, module: nn.Module, path: str, axis: str) -> DependencyGroup:
    """Return the dependency group of `axis` in the module at `path`."""
    groups = layout.axes[axis]
    sets, units = layout.count(groups), layout.sizes[axis]
    counts = layout.counts.get(axis, Counts())
    slices = members(layout, module, path, axis, groups)
    tensor, matrix = (f"{path}.{name}" for name in layout.gains.get(axis, ("", "")))
    columns = [member.index for member in slices if member.tensor == matrix and member.dims == (1,)]
    return DependencyGroup(
        layer=path,
        axis=axis,
        groups=sets,
        units=units,
        members=tuple(slices),
        state_bytes_per_unit=state_bytes(layout) // (sets * units) if axis in layout.state else 0,
        multiple_of=counts.multiple_of,
        least=counts.least,
        why_least=counts.why,
        gain=Gain(tensor, matrix, columns[0]) if columns else None,
    )
