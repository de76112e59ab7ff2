"""Which scorer decides: by name, by basis, or the best of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sspruner.axes import ELEMENT_AXES
from sspruner.errors import InputError
from sspruner.scoring.job import OneScorer
from sspruner.scoring.known import find_scorer, installed_scorers, scorer_of_basis
from sspruner.scoring.scorer import SELECT, Scorer

DEFAULT = "ghost"
AUTO = "auto"


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
        if find_scorer(part)[0].reduce is not Scorer.reduce:
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
        return {axis: scorer_of_basis(basis) if axis == "state" else DEFAULT for axis in axes}
    decides = scorer.get("state", DEFAULT) if isinstance(scorer, Mapping) else scorer
    own, _ = find_scorer(decides) if isinstance(decides, str) else (decides, "")
    if own.basis != basis:
        raise InputError(f"basis {basis!r}: scorer {own.name!r} has basis {own.basis!r}; leave one of them out")
    return scorer


def candidates(axis: str, basis: str) -> list[str]:
    """The installed scorers that may be chosen by themselves on an axis: those of a basis that only select, and that
    need no loss of their own for every unit.
    """
    return [
        name
        for name, (cls, _) in sorted(installed_scorers().items())
        if axis in cls.axes and cls.basis == basis and cls.reduce is Scorer.reduce and cls.needs != "loss"
    ]
