"""Reduction of one dependency group: a selection of its units, or a projection of its state to fewer directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from sspruner.errors import PlanError
from sspruner.files.fields import integer
from sspruner.graph.group import DependencyGroup

INVERSE = 1e-3  # largest allowed |encode @ decode - I|; correct fp32 matrices are far below
PARTS = ("encode", "decode")

Basis = tuple[torch.Tensor, torch.Tensor]  # encode (G, units, N), decode (G, N, units): unit i is row i and column i


@dataclass(frozen=True)
class Selection:
    """Reduction that keeps some units of a dependency group.

    keep: for each set, the kept indices, increasing and below `before`.
    """

    before: int
    keep: tuple[tuple[int, ...], ...]

    @property
    def after(self) -> int:
        """Number of units kept in every set."""
        return len(self.keep[0])

    @property
    def sets(self) -> int:
        """Number of sets of units."""
        return len(self.keep)

    def dropped(self, group: int) -> list[int]:
        """Return the removed units of one set, in increasing order."""
        kept = set(self.keep[group])
        return [unit for unit in range(self.before) if unit not in kept]

    def to_json(self) -> dict[str, Any]:
        """Return the group's line in plan.json."""
        return {"before": self.before, "after": self.after, "keep": [list(k) for k in self.keep]}


@dataclass(frozen=True, eq=False)
class Projection:
    """Reduction of a state of `before` coordinates to `after` directions, in every B/C group of a Mamba2-type mixer.

    encode: fp32 (G, k, N), decode: fp32 (G, N, k), with encode @ decode = I. The state becomes encode h, of size k;
    decode @ encode is the projector of rank k that a mask applies. No row of a tensor is removed.
    """

    encode: torch.Tensor
    decode: torch.Tensor

    @property
    def before(self) -> int:
        """N, number of coordinates of the state."""
        return self.encode.shape[2]

    @property
    def after(self) -> int:
        """k, number of directions that are kept."""
        return self.encode.shape[1]

    @property
    def sets(self) -> int:
        """G, number of B/C groups."""
        return self.encode.shape[0]

    def dropped(self, group: int) -> list[int]:
        """Return an empty list: a projection removes no rows."""
        return []

    def to_json(self) -> dict[str, Any]:
        """Return the group's line in plan.json. The matrices are stored in the file beside it."""
        return {"before": self.before, "after": self.after, "sets": self.sets}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Projection):
            return NotImplemented
        pairs = zip((self.encode, self.decode), (other.encode, other.decode), strict=True)
        return all(a.shape == b.shape and torch.equal(a.cpu(), b.cpu()) for a, b in pairs)


Reduction = Selection | Projection


def reduction(keep: torch.Tensor, basis: Basis | None = None) -> Reduction:
    """Return the reduction for `keep`, bool (groups, units): of units, or of the directions of `basis`, if given."""
    if basis is None:
        return Selection(keep.shape[1], tuple(tuple(row.nonzero().flatten().tolist()) for row in keep))
    encode, decode = basis
    return Projection(
        torch.stack([e[k] for e, k in zip(encode, keep, strict=True)]),
        torch.stack([d[:, k] for d, k in zip(decode, keep, strict=True)]).contiguous(),
    )


def from_json(name: str, data: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Reduction:
    """Parse a group's line in plan.json. Raises KeyError, TypeError or ValueError for malformed data.

    tensors: content of the file beside plan.json. A projection that is missing there gets matrices on the meta device.
    """
    before = integer(data["before"])
    if "keep" in data:
        return Selection(before, tuple(tuple(map(integer, k)) for k in data["keep"]))
    if "sets" not in data:
        raise ValueError("neither 'keep', of a selection, nor 'sets', of a projection")
    sets, after = integer(data["sets"]), integer(data["after"])
    shapes = {"encode": (sets, after, before), "decode": (sets, before, after)}
    if min(sets, after, before) < 1:
        raise ValueError(f"a projection of {shapes['encode']}")
    parts = {}
    for part, shape in shapes.items():
        matrix = tensors.get(f"{name}.{part}")
        parts[part] = torch.empty(shape, device="meta") if matrix is None else matrix
        if parts[part].shape != shape:
            raise ValueError(f"{part} is {tuple(parts[part].shape)}, not {shape}")
    return Projection(**parts)


def projections(groups: Mapping[str, Reduction]) -> dict[str, Projection]:
    """Return the projections among the reductions of a plan."""
    return {name: r for name, r in groups.items() if isinstance(r, Projection)}


def tensors_of(groups: Mapping[str, Reduction]) -> dict[str, torch.Tensor]:
    """Return the matrices of all projections by their names in the file beside plan.json."""
    return {f"{name}.{part}": getattr(r, part) for name, r in projections(groups).items() for part in PARTS}


def check_reduction(where: str, reduction: Reduction) -> None:
    """Raise PlanError unless a reduction is consistent in itself."""
    if isinstance(reduction, Projection):
        _check_projection(where, reduction)
        return
    counts = {len(k) for k in reduction.keep}
    if len(counts) != 1:
        raise PlanError(f"{where}: keeps {sorted(counts)} units; every group needs the same count")
    for keep in reduction.keep:
        if any(a >= b for a, b in pairwise(keep)) or (keep and not 0 <= keep[0] <= keep[-1] < reduction.before):
            raise PlanError(f"{where}: indices must increase within 0 to {reduction.before - 1}")


def _check_projection(where: str, projection: Projection) -> None:
    if projection.decode.shape != (projection.sets, projection.before, projection.after):
        raise PlanError(f"{where}: encode is {tuple(projection.encode.shape)}, decode {tuple(projection.decode.shape)}")
    if projection.encode.is_meta:
        return
    if {projection.encode.dtype, projection.decode.dtype} != {torch.float32}:
        raise PlanError(f"{where}: encode and decode of a projection are fp32")
    product = projection.encode.double() @ projection.decode.double()  # (G, k, k)
    error = float((product - torch.eye(projection.after, dtype=torch.float64, device=product.device)).abs().max())
    if not error <= INVERSE:  # also catches NaN
        raise PlanError(f"{where}: encode @ decode is not the identity (off by {error:.1e}): no projection")


def check_fits(name: str, reduction: Reduction, group: DependencyGroup) -> None:
    """Raise PlanError unless a reduction starts from the sizes of the model's group."""
    if (reduction.before, reduction.sets) != (group.units, group.groups):
        raise PlanError(
            f"{name}: the plan starts from {reduction.sets} x {reduction.before} units, the model has "
            f"{group.groups} x {group.units}; make a plan for this model"
        )
    if isinstance(reduction, Projection) and reduction.encode.is_meta:
        raise PlanError(f"{name}: the matrices of its projection are missing")
