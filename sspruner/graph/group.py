"""Dependency groups: tensor slices that must be cut together along one axis, or modules that can be removed whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

# What a mask makes of the rows of dropped units. A dropped expert must not be chosen: its logit, or the bias that is
# added before the choice, is -inf.
ZERO = "zero"
BARRED = "-inf"
BARRED_LOGITS = "zero, and the products of an input with these rows -inf"


@dataclass(frozen=True)
class Member:
    """Slice of one tensor that belongs to the units of a group.

    index     int64 (groups, units, rows per unit) on the CPU: rows of `tensor` along `dims` (flattened, if several)
    row_size  number of elements in one such row
    counted   True for a parameter; buffers are cut, but not counted
    mask      what a mask makes of the rows: ZERO, BARRED or BARRED_LOGITS
    """

    tensor: str
    dims: tuple[int, ...]
    rows: str
    index: torch.Tensor
    row_size: int
    counted: bool = True
    mask: str = ZERO

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the member's values for each unit: (groups, units, elements per unit), fp32."""
        groups, units, _ = self.index.shape
        rows = as_rows(tensor.detach(), self.dims).index_select(0, self.index.flatten().to(tensor.device))
        return rows.reshape(groups, units, -1).float()


@dataclass(frozen=True)
class Gain:
    """Factors by unit that all sets of a group share: the weight of a norm that averages over each set alone.

    No unit owns one of them. Where the sets of a cut differ, `into` takes them up, and they become 1.

    tensor   name of the factors, (units,)
    into     name of the matrix that reads the units after the norm
    columns  int64 (groups, units, columns per unit): its columns
    """

    tensor: str
    into: str
    columns: torch.Tensor


@dataclass(frozen=True)
class Block:
    """Unit of the axes `block` and `mixer`: a module that adds to the residual stream and can be removed whole.

    path     path of the module
    writers  parameters that write to the residual stream: the module adds nothing when they are zero (its mask)
    extras   modules elsewhere that only this one uses and that are removed with it (Zamba2's adapters)
    """

    path: str
    writers: tuple[str, ...]
    extras: tuple[str, ...] = ()


@dataclass(frozen=True)
class DependencyGroup:
    """Units of one layer on one axis that are cut together in every member: `groups` sets of `units` units.

    Every set keeps the same number of units, since the model's forward reshapes a flat dimension by them; which units
    are kept may differ between sets. The number is a multiple of `multiple_of`, and `least` or more, for the reason
    `why_least`; it may always be all of them. A group of whole modules has `blocks`, one for each unit, and no
    members. `gain` are factors that belong to a unit's number, whatever the set.

    On the axes of single elements `tensor` names a two-dimensional parameter: sets are its rows, units its columns,
    there are no members, and any number of elements may be zeroed. `runs` names ranges of its rows.
    """

    layer: str
    axis: str
    groups: int
    units: int
    members: tuple[Member, ...]
    state_bytes_per_unit: int = 0
    blocks: tuple[Block, ...] = ()
    multiple_of: int = 1
    least: int = 1
    why_least: str = ""
    tensor: str = ""
    runs: Mapping[str, torch.Tensor] | None = None  # name -> int64 (rows,)
    gain: Gain | None = None

    @property
    def name(self) -> str:
        """`<module path>:<axis>`, the key used in plans and score files."""
        return f"{self.layer}:{self.axis}"

    @property
    def parameters_per_unit(self) -> int:
        """Number of parameters removed with one unit, if nothing else is cut."""
        return sum(m.index.shape[2] * m.row_size for m in self.members if m.counted)

    def counts(self, multiple_of: int = 1, least: int = 1) -> range:
        """Return the numbers of units that a cut may keep in every set, fewer than all, in increasing order.

        They are multiples of `multiple_of` and of the group's own, and not below `least` and the group's own.
        """
        step = math.lcm(multiple_of, self.multiple_of)
        return range(math.ceil(max(least, self.least, 1) / step) * step, self.units, step)

    def key(self, tensor: str) -> str:
        """Return a parameter's name relative to the layer, as scorers use it."""
        return tensor.removeprefix(f"{self.layer}.")

    def gather(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Select the units' elements from tensors in the shapes of the parameters, which are given by key.

        Returns `<key>:<rows>` -> (groups, units, elements); members whose tensor is not given are left out. On the axes
        of single elements the result has the tensor's own key and shape (rows, columns, 1).
        """
        if self.tensor:
            return {key: t.float()[..., None] for key, t in tensors.items() if key == self.key(self.tensor)}
        return {
            f"{self.key(m.tensor)}:{m.rows}": m.gather(tensors[self.key(m.tensor)])
            for m in self.members
            if m.counted and self.key(m.tensor) in tensors
        }


def as_rows(tensor: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """Move `dims` to the front and flatten them: (rows, ...). Shares memory where possible."""
    return tensor.movedim(dims, tuple(range(len(dims)))).flatten(0, len(dims) - 1)


def drop_rows(tensor: torch.Tensor, dims: tuple[int, ...], rows: torch.Tensor) -> torch.Tensor:
    """Return `tensor` without `rows` along `dims`. Of several dims the last one shrinks, equally at every index."""
    flat = as_rows(tensor, dims)
    keep = torch.ones(len(flat), dtype=torch.bool, device="cpu")
    keep[rows] = False
    kept = flat.index_select(0, keep.nonzero().flatten().to(tensor.device))
    kept = kept.reshape(*(tensor.shape[d] for d in dims[:-1]), -1, *kept.shape[1:])
    return kept.movedim(tuple(range(len(dims))), dims).contiguous()
