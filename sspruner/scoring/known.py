"""Registry of the installed scorers."""

from __future__ import annotations

import difflib

from sspruner.errors import InputError, PluginError
from sspruner.plugins.manager import collect
from sspruner.scoring.scorer import Scorer, check_scorer_class


def installed_scorers() -> dict[str, tuple[type[Scorer], str]]:
    """Return every scorer by name, with its plugin. Raises PluginError on a name clash or a malformed scorer."""
    scorers: dict[str, tuple[type[Scorer], str]] = {}
    for cls, plugin in collect("sspruner_scorers"):
        check_scorer_class(cls, plugin)
        if cls.name in scorers:
            raise PluginError(
                f"scorer {cls.name!r}: offered by plugin {scorers[cls.name][1]!r} and by plugin {plugin!r}; rename one"
            )
        scorers[cls.name] = (cls, plugin)
    return scorers


def find_scorer(name: str) -> tuple[type[Scorer], str]:
    """Return the scorer called `name` and its plugin.

    Raises InputError that lists the known scorers and suggests the nearest.
    """
    known = installed_scorers()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"unknown scorer {name!r}; known: {', '.join(sorted(known))}{hint}")
    return known[name]


def scorer_of_basis(basis: str) -> str:
    """Return the name of the first scorer with a basis. Raises InputError that lists the known bases."""
    known = {cls.basis: name for name, (cls, _) in sorted(installed_scorers().items(), reverse=True)}
    if basis not in known:
        raise InputError(f"unknown basis {basis!r}; installed scorers have: {', '.join(sorted(known))}")
    return known[basis]
