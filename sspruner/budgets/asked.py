"""What a user asks for: which scorers decide, and the budget. Checked before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sspruner.axes import ELEMENT_AXES
from sspruner.budgets.budget import Budget, pattern_sparsity
from sspruner.budgets.limits import Limits
from sspruner.errors import InputError

BEST_SIZE = "uniform-best"


def make_budget(
    axis: str | Mapping[str, float],
    sparsity: float | None = None,
    keep: int | None = None,
    allocation: str = "uniform",
    multiple_of: int = 1,
    ratios: Mapping[str, float] | None = None,
    ignore: Sequence[str] = (),
    pattern: str | None = None,
    granularity: str | None = None,
    rows: Sequence[str] = (),
    normalise: str | None = None,
    floor: Mapping[str, int] | None = None,
    cap: Mapping[str, int] | None = None,
    limits: Limits | None = None,
) -> Budget:
    """The arguments of `prune` as a Budget; with limits its fraction is a stand-in until one is found.

    Raises InputError for fractions given twice, or that make no sense.
    """
    if limits is not None:
        _check_limits(axis, sparsity, keep, pattern)
    if allocation == BEST_SIZE:
        if limits is None or not limits.of_damage or ratios or floor or cap:
            raise InputError(
                f"allocation {BEST_SIZE} finds the smallest one size for all layers within a limit of damage: give "
                "max-ppl-increase or max-kl, and no ratios, floor or cap"
            )
        allocation = "uniform"
    rest = (
        allocation,
        multiple_of,
        ratios or {},
        ignore,
        pattern,
        granularity,
        rows,
        normalise,
        floor or {},
        cap or {},
    )
    if isinstance(axis, str):
        if sparsity is None and keep is None:
            sparsity = pattern_sparsity(pattern) if pattern else 0.5
        return Budget(sparsity, keep, *rest)
    if sparsity is not None or keep is not None:
        raise InputError("every axis has its own fraction; leave out sparsity and keep, or name one axis alone")
    return Budget(axis, None, *rest)


def _check_limits(
    axis: str | Mapping[str, float], sparsity: float | None, keep: int | None, pattern: str | None
) -> None:
    if not isinstance(axis, str) or axis in ELEMENT_AXES:
        raise InputError("limits decide how much of one axis of units is removed: name one axis, without a fraction")
    if sparsity is not None or keep is not None or pattern:
        raise InputError("limits decide how much is removed: leave out sparsity, keep and pattern")
