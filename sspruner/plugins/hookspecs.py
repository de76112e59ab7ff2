"""Hooks that a plugin may implement. A hook is a signature and a sentence; docs/plugins.md has the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from sspruner.graph.family import Family
    from sspruner.scoring.scorer import Scorer

hookspec = pluggy.HookspecMarker("sspruner")
hookimpl = pluggy.HookimplMarker("sspruner")


@hookspec
def sspruner_scorers() -> list[type[Scorer]]:  # type: ignore[empty-body]
    """Return the scorer classes that this plugin offers."""


@hookspec
def sspruner_families() -> list[Family]:  # type: ignore[empty-body]
    """Return one object for each model family that this plugin describes."""
