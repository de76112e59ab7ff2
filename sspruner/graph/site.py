"""Site: one module that the graph describes."""

from __future__ import annotations

from dataclasses import dataclass

from sspruner.graph.family import Family
from sspruner.graph.layout import Layout, state_bytes


@dataclass(frozen=True)
class Site:
    """Path, kind and layout of one module that the graph describes.

    family    the family of a mixer; None for other modules
    aliases   other paths that share the same parameters (Zamba's shared blocks): parameters are cut once, attributes
              are corrected at every path
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
    """Return whether the module or parameter at `path` is `outer` or lies inside it."""
    return path == outer or path.startswith(f"{outer}.")
