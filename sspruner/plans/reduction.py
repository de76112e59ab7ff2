"""What happens to one dependency group: a selection of its units, or a projection of its state on a few directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from sspruner.errors import PlanError
from sspruner.files.fields import integer
from sspruner.graph.group import DependencyGroup

INVERSE = 1e-3  # how far encode @ decode may be from the identity: in fp32, a well-made one stays far below
PARTS = ("encode", "decode")

Basis = tuple[torch.Tensor, torch.Tensor]  # encode (G, units, N), decode (G, N, units): unit i is row i and column i


@dataclass(frozen=True)
class Selection:
    """Keep these units of a dependency group: `keep` holds, per set, increasing indices below `before`."""

    before: int
    keep: tuple[tuple[int, ...], ...]

    @property
    def after(self) -> int:
        """Units kept in every set."""
        return len(self.keep[0])

    @property
    def sets(self) -> int:
        """How many sets of units there are."""
        return len(self.keep)

    def dropped(self, group: int) -> list[int]:
        """The units of one set that go, in increasing order."""
        kept = set(self.keep[group])
        return [unit for unit in range(self.before) if unit not in kept]

    def to_json(self) -> dict[str, Any]:
        """Its line in plan.json."""
        return {"before": self.before, "after": self.after, "keep": [list(k) for k in self.keep]}


@dataclass(frozen=True, eq=False)
class Projection:
    """Keep `after` directions of a state of `before` coordinates, in every B/C group (axis state, Mamba2-type mixers).

    encode: fp32 (G, k, N), decode: fp32 (G, N, k), with encode @ decode = I. The state becomes encode h, of size k;
    decode @ encode is the projector of rank k that a mask applies. No row of a tensor goes.
    """

    encode: torch.Tensor
    decode: torch.Tensor

    @property
    def before(self) -> int:
        """N, the coordinates of the state."""
        return self.encode.shape[2]

    @property
    def after(self) -> int:
        """k, the directions that stay."""
        return self.encode.shape[1]

    @property
    def sets(self) -> int:
        """G, the B/C groups."""
        return self.encode.shape[0]

    def dropped(self, group: int) -> list[int]:
        """No unit's rows go."""
        return []

    def to_json(self) -> dict[str, Any]:
        """Its line in plan.json; the matrices are in the file beside it."""
        return {"before": self.before, "after": self.after, "sets": self.sets}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Projection):
            return NotImplemented
        pairs = zip((self.encode, self.decode), (other.encode, other.decode), strict=True)
        return all(a.shape == b.shape and torch.equal(a.cpu(), b.cpu()) for a, b in pairs)


Reduction = Selection | Projection


def reduction(keep: torch.Tensor, basis: Basis | None = None) -> Reduction:
    """What stays, bool (groups, units), as a reduction: of the units themselves, or of the directions that they are."""
    if basis is None:
        return Selection(keep.shape[1], tuple(tuple(row.nonzero().flatten().tolist()) for row in keep))
    encode, decode = basis
    return Projection(
        torch.stack([e[k] for e, k in zip(encode, keep, strict=True)]),
        torch.stack([d[:, k] for d, k in zip(decode, keep, strict=True)]).contiguous(),
    )


def from_json(name: str, data: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Reduction:
    """Inverse of `to_json`. tensors: what lies beside plan.json; a projection that is not in it gets sizes alone, on
    the meta device. Raises KeyError, TypeError or ValueError for malformed data.
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
        found = tensors.get(f"{name}.{part}")
        parts[part] = torch.empty(shape, device="meta") if found is None else found
        if parts[part].shape != shape:
            raise ValueError(f"{part} is {tuple(parts[part].shape)}, not {shape}")
    return Projection(**parts)


def projections(groups: Mapping[str, Reduction]) -> dict[str, Projection]:
    """The projections among the reductions of a plan."""
    return {name: r for name, r in groups.items() if isinstance(r, Projection)}


def tensors_of(groups: Mapping[str, Reduction]) -> dict[str, torch.Tensor]:
    """The matrices of all projections, as the file beside plan.json names them."""
    return {f"{name}.{part}": getattr(r, part) for name, r in projections(groups).items() for part in PARTS}


def check_reduction(where: str, reduction: Reduction) -> None:
    """Raise PlanError unless a reduction makes sense by itself."""
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
    inside = projection.encode.double() @ projection.decode.double()  # (G, k, k)
    error = float((inside - torch.eye(projection.after, dtype=torch.float64, device=inside.device)).abs().max())
    if not error <= INVERSE:  # also catches NaN
        raise PlanError(f"{where}: encode @ decode is not the identity (off by {error:.1e}): no projection")


def check_fits(name: str, reduction: Reduction, group: DependencyGroup) -> None:
    """Raise PlanError unless a reduction starts from what the model has."""
    if (reduction.before, reduction.sets) != (group.units, group.groups):
        raise PlanError(
            f"{name}: the plan starts from {reduction.sets} x {reduction.before} units, the model has "
            f"{group.groups} x {group.units}; make a plan for this model"
        )
    if isinstance(reduction, Projection) and reduction.encode.is_meta:
        raise PlanError(f"{name}: the matrices of its projection are missing")
