"""Site: one module that the graph describes."""

from __future__ import annotations

from dataclasses import dataclass

from sspruner.graph.family import Family
from sspruner.graph.layout import Layout, state_bytes


@dataclass(frozen=True)
class Site:
    """One module that the graph describes: where it is, what kind it is, how its rows lie.

    family    the family of a mixer; None for the parts around the mixers
    aliases   other paths that hold the same parameters (Zamba's shared blocks): cut once, corrected everywhere
    """

    path: str
    kind: str
    layout: Layout
    parameters: int
    family: Family | None = None
    aliases: tuple[str, ...] = ()

    @property
    def state_bytes(self) -> int:
        """Bytes of recurrent state that one sequence keeps here at decode."""
        return state_bytes(self.layout)


def within(path: str, outer: str) -> bool:
    """Whether the module or parameter at `path` is `outer` or lies inside it."""
    return path == outer or path.startswith(f"{outer}.")
