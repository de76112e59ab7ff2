"""Choose the scorer: by name, by basis, or the best of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sspruner.axes import ELEMENT_AXES
from sspruner.errors import InputError
from sspruner.scoring.job import OneScorer
from sspruner.scoring.known import find_scorer, installed_scorers, scorer_of_basis
from sspruner.scoring.scorer import SELECT, Scorer

DEFAULT = "ghost"
AUTO = "auto"


def is_auto(scorer: OneScorer | None) -> bool:
    """Return whether the scorer is to be chosen: "auto" and "auto:NAME,NAME"."""
    return isinstance(scorer, str) and scorer.partition(":")[0] == AUTO


def choose_scorers(scorer: OneScorer | None, basis: str | None, axes: Sequence[str]) -> list[OneScorer]:
    """Return the named scorer, or, for "auto" and "auto:NAME,NAME", the scorers to choose from.

    Raises InputError for an unknown scorer, for a basis that it does not have, and for auto without candidates.
    """
    if not is_auto(scorer):
        return [_with_basis(scorer, basis, axes)]
    _, colon, names = str(scorer).partition(":")
    if len(axes) != 1 or axes[0] in ELEMENT_AXES:
        raise InputError("scorer auto chooses for one axis of units; name the scorers of several axes")
    if not colon:
        names_found = candidates(axes[0], basis or SELECT)
        if not names_found:
            raise InputError(f"scorer auto: no installed scorer selects on axis {axes[0]!r}")
        return list(names_found)
    listed = [part.strip() for part in names.split(",")]
    for part in listed:
        if find_scorer(part)[0].reduce is not Scorer.reduce:
            raise InputError(f"scorer auto compares selections; {part!r} changes weights, too: use it alone")
    return list(listed)


def _with_basis(scorer: OneScorer | None, basis: str | None, axes: Sequence[str]) -> OneScorer:
    """Return the named scorer; without a name, the scorer of the basis on the state, and the default on other axes.

    Raises InputError for a basis that no installed scorer, or not the named one, has, and for a basis without the
    state.
    """
    if basis is None:
        return DEFAULT if scorer is None else scorer
    if "state" not in axes and basis != SELECT:
        raise InputError(f"basis {basis!r}: is one of the state; add axis state, or leave it out")
    if scorer is None and basis == SELECT:
        return DEFAULT
    if scorer is None:
        return {axis: scorer_of_basis(basis) if axis == "state" else DEFAULT for axis in axes}
    state_scorer = scorer.get("state", DEFAULT) if isinstance(scorer, Mapping) else scorer
    cls, _ = find_scorer(state_scorer) if isinstance(state_scorer, str) else (state_scorer, "")
    if cls.basis != basis:
        raise InputError(f"basis {basis!r}: scorer {cls.name!r} has basis {cls.basis!r}; leave one of them out")
    return scorer


def bases_not_tried(scorer: OneScorer | None, basis: str | None, axes: Sequence[str]) -> list[str]:
    """Return the other bases of the state that installed scorers have, where "auto" tried coordinates alone."""
    if scorer != AUTO or basis is not None or [*axes] != ["state"]:
        return []
    return sorted({cls.basis for cls, _ in installed_scorers().values()} - {SELECT})


def candidates(axis: str, basis: str) -> list[str]:
    """Return the installed scorers that "auto" chooses from on an axis.

    These are the scorers of a basis that only select, and that do not need a loss for every unit.
    """
    return [
        name
        for name, (cls, _) in sorted(installed_scorers().items())
        if axis in cls.axes and cls.basis == basis and cls.reduce is Scorer.reduce and cls.needs != "loss"
    ]
