"""What a user asks for: which scorers decide, and the budget. Checked before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sspruner import ELEMENT_AXES
from sspruner.errors import InputError
from sspruner.job import OneScorer
from sspruner.limits import Limits
from sspruner.planning.budget import Budget, pattern_sparsity
from sspruner.plugins import manager
from sspruner.plugins.scorer import SELECT, Scorer

DEFAULT = "ghost"
AUTO = "auto"
BEST_SIZE = "uniform-best"


def scorers_asked(scorer: OneScorer | None, basis: str | None, axes: Sequence[str]) -> list[OneScorer]:
    """The scorer that decides, or, for "auto" and "auto:NAME,NAME", those that it is chosen from.

    Raises InputError for one that does not exist, for a basis that it has not, and for auto where there is no choice.
    """
    name, colon, names = scorer.partition(":") if isinstance(scorer, str) else ("", "", "")
    if name != AUTO:
        return [_with_basis(scorer, basis, axes)]
    if len(axes) != 1 or axes[0] in ELEMENT_AXES:
        raise InputError("scorer auto chooses for one axis of units; name the scorers of several axes")
    if not colon:
        found = candidates(axes[0], basis or SELECT)
        if not found:
            raise InputError(f"scorer auto: no installed scorer selects on axis {axes[0]!r}")
        return list(found)
    asked = [part.strip() for part in names.split(",")]
    for part in asked:
        if manager.scorer(part)[0].reduce is not Scorer.reduce:
            raise InputError(f"scorer auto compares selections; {part!r} changes weights, too: use it alone")
    return list(asked)


def _with_basis(scorer: OneScorer | None, basis: str | None, axes: Sequence[str]) -> OneScorer:
    """The scorer that was named; without one the scorer of the basis on the state, and the default elsewhere.

    Raises InputError for a basis that no installed scorer has, or that the named one has not, and without the state.
    """
    if basis is None:
        return DEFAULT if scorer is None else scorer
    if "state" not in axes and basis != SELECT:
        raise InputError(f"basis {basis!r}: is one of the state; add axis state, or leave it out")
    if scorer is None and basis == SELECT:
        return DEFAULT
    if scorer is None:
        return {axis: manager.scorer_of_basis(basis) if axis == "state" else DEFAULT for axis in axes}
    decides = scorer.get("state", DEFAULT) if isinstance(scorer, Mapping) else scorer
    own, _ = manager.scorer(decides) if isinstance(decides, str) else (decides, "")
    if own.basis != basis:
        raise InputError(f"basis {basis!r}: scorer {own.name!r} has basis {own.basis!r}; leave one of them out")
    return scorer


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


def candidates(axis: str, basis: str) -> list[str]:
    """The installed scorers that may be chosen by themselves on an axis: those of a basis that only select, and that
    need no loss of their own for every unit.
    """
    return [
        name
        for name, (cls, _) in sorted(manager.scorers().items())
        if axis in cls.axes and cls.basis == basis and cls.reduce is Scorer.reduce and cls.needs != "loss"
    ]
