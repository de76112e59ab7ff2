"""The installed model families, by name."""

from __future__ import annotations

from sspruner.errors import PluginError
from sspruner.graph.family import Family
from sspruner.plugins.manager import collect


def installed_families() -> dict[str, Family]:
    """Every model family by name. Raises PluginError on a clash or a malformed family."""
    found: dict[str, Family] = {}
    origin: dict[str, str] = {}
    for family, plugin in collect("sspruner_families"):
        if not isinstance(family, Family) or not all(hasattr(family, a) for a in ("name", "mixer_class")):
            raise PluginError(
                f"plugin {plugin!r}: sspruner_families returned {family!r}, not an object of a subclass of "
                "sspruner.Family with name and mixer_class"
            )
        for taken in (f"family {family.name!r}", f"mixer class {family.mixer_class!r}"):
            if taken in origin:
                raise PluginError(f"{taken}: described by plugin {origin[taken]!r} and by {plugin!r}; remove one")
            origin[taken] = plugin
        found[family.name] = family
    return found
