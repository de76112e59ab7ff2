"""Dependency groups: all the tensor slices that must be cut together along one axis, or the blocks that may go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Member:
    """A tensor slice that the units of a group own.

    index: int64 (groups, units, rows per unit) on the CPU: rows of `tensor` along `dims` (several are seen as one).
    row_size: number of elements in one such row. counted: whether it is a parameter (buffers are cut, not counted).
    """

    tensor: str
    dims: tuple[int, ...]
    rows: str
    index: torch.Tensor
    row_size: int
    counted: bool = True

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The member's values, unit by unit: (groups, units, elements per unit), fp32."""
        groups, units, _ = self.index.shape
        rows = as_rows(tensor.detach(), self.dims).index_select(0, self.index.flatten().to(tensor.device))
        return rows.reshape(groups, units, -1).float()


@dataclass(frozen=True)
class Block:
    """One unit of the axes `block` and `mixer`: a module that adds to the residual stream and may go as a whole.

    path     the module
    writers  the parameters that write its contribution: with them at zero the module adds nothing (its mask)
    extras   modules elsewhere that only this one uses, and that go with it (Zamba2's adapters)
    """

    path: str
    writers: tuple[str, ...]
    extras: tuple[str, ...] = ()


@dataclass(frozen=True)
class DependencyGroup:
    """One layer x one axis: `groups` sets of `units` units, cut together in every member.

    Constraint: every set keeps the same number of units (`keep` index sets may differ between sets, counts may
    not), because the model's forward reshapes a flat dimension by them; and a multiple of `multiple_of`, where the
    model's code asks for one. A group of whole modules has `blocks`, one for each unit, and no members.

    On the axes of single elements `tensor` names a parameter of two dimensions, rows and columns: these are the sets
    and the units, there are no members, and any number of elements may go. `runs` names some of the rows.
    """

    layer: str
    axis: str
    groups: int
    units: int
    members: tuple[Member, ...]
    state_bytes_per_unit: int = 0
    blocks: tuple[Block, ...] = ()
    multiple_of: int = 1
    tensor: str = ""
    runs: Mapping[str, torch.Tensor] | None = None  # name -> int64 (rows,)

    @property
    def name(self) -> str:
        """`<module path>:<axis>`, the key used in plans and score files."""
        return f"{self.layer}:{self.axis}"

    @property
    def parameters_per_unit(self) -> int:
        """Number of parameters that leave the model with one unit, if nothing else is cut."""
        return sum(m.index.shape[2] * m.row_size for m in self.members if m.counted)

    def key(self, tensor: str) -> str:
        """How scorers call a parameter: its name relative to the layer."""
        return tensor.removeprefix(f"{self.layer}.")

    def gather(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The units' elements of tensors in the shapes of the parameters, by key: `<key>:<rows>` -> (groups, units, e).

        What is not given is left out. On the axes of single elements the result has the tensor's own key.
        """
        if self.tensor:
            return {key: t.float()[..., None] for key, t in tensors.items() if key == self.key(self.tensor)}
        return {
            f"{self.key(m.tensor)}:{m.rows}": m.gather(tensors[self.key(m.tensor)])
            for m in self.members
            if m.counted and self.key(m.tensor) in tensors
        }


def as_rows(tensor: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """`tensor` with `dims` in front, seen as one dimension: (rows, ...). Shares memory where it can."""
    return tensor.movedim(dims, tuple(range(len(dims)))).flatten(0, len(dims) - 1)


def drop_rows(tensor: torch.Tensor, dims: tuple[int, ...], rows: torch.Tensor) -> torch.Tensor:
    """`tensor` without `rows` along `dims`; of several dimensions the last one shrinks, by as much everywhere."""
    flat = as_rows(tensor, dims)
    keep = torch.ones(len(flat), dtype=torch.bool, device="cpu")
    keep[rows] = False
    kept = flat.index_select(0, keep.nonzero().flatten().to(tensor.device))
    kept = kept.reshape(*(tensor.shape[d] for d in dims[:-1]), -1, *kept.shape[1:])
    return kept.movedim(tuple(range(len(dims))), dims).contiguous()
