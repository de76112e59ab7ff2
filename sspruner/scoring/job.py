"""Job: one scorer for each axis, with its options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sspruner.compute.processes import world
from sspruner.errors import InputError
from sspruner.scoring.known import find_scorer, installed_scorers
from sspruner.scoring.scorer import Scorer, check_combines, check_scorer_class, make_scorer

OneScorer = str | type[Scorer] | Mapping[str, str]  # a name, a class, or a name for each axis


class Job:
    """One scorer for each axis, with its options; produces one Scores."""

    def __init__(self, scorer: OneScorer, axes: Sequence[str], options: Mapping[str, Any], seed: int) -> None:
        self.scorers = {axis: _scorer_for(axis, scorer) for axis in axes}
        unused = [axis for axis in scorer if axis not in axes] if isinstance(scorer, Mapping) else []
        if unused:
            raise InputError(f"a scorer for axis {unused[0]!r}, which is not cut; these are: {', '.join(axes)}")
        self.label = ", ".join(dict.fromkeys(cls.name for cls, _ in self.scorers.values()))
        self.seed = seed
        names = {cls.name for cls, _ in self.scorers.values()}
        self.options = {k: v for k, v in options.items() if k.rpartition(".")[0] in ("", *names)}
        self.changes_weights = [cls.name for cls, _ in self.scorers.values() if cls.reduce is not Scorer.reduce]
        instances = [self.make(axis) for axis in axes]  # wrong options fail here, before any work
        self.needs = {instance.needs for instance in instances}
        for instance in instances if world() > 1 else ():
            check_combines(instance)

    def make(self, axis: str) -> Scorer:
        """Create an instance for one dependency group. `name.option` is an option of that scorer only."""
        cls, _ = self.scorers[axis]
        options = {k: v for k, v in self.options.items() if "." not in k}
        options |= {
            k.removeprefix(f"{cls.name}."): v for k, v in self.options.items() if k.rpartition(".")[0] == cls.name
        }
        return make_scorer(cls, axis=axis, seed=self.seed, options=options)


def _scorer_for(axis: str, scorer: OneScorer) -> tuple[type[Scorer], str]:
    """Return the scorer class for one axis and its plugin. Raises InputError if there is none for this axis."""
    if isinstance(scorer, Mapping):
        if axis not in scorer:
            raise InputError(f"no scorer for axis {axis!r}: {', '.join(scorer)} have one; add {axis}=NAME")
        scorer = scorer[axis]
    if isinstance(scorer, str):
        cls, plugin = find_scorer(scorer)
    else:
        cls, plugin = scorer, getattr(scorer, "__module__", "?")
        check_scorer_class(cls, plugin)
    if axis not in cls.axes:
        names = [name for name, (other, _) in sorted(installed_scorers().items()) if axis in other.axes]
        hint = f"; these score {axis}: {', '.join(names)}" if names else ""
        raise InputError(
            f"scorer {cls.name!r} does not score axis {axis!r}; it scores {', '.join(sorted(cls.axes))}{hint}"
        )
    return cls, plugin
