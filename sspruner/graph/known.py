"""Registry of the installed model families."""

from __future__ import annotations

from sspruner.errors import PluginError
from sspruner.graph.family import Family
from sspruner.plugins.manager import collect


def installed_families() -> dict[str, Family]:
    """Return every model family by name. Raises PluginError on a name clash or a malformed family."""
    families: dict[str, Family] = {}
    origin: dict[str, str] = {}
    for family, plugin in collect("sspruner_families"):
        if not isinstance(family, Family) or not all(hasattr(family, a) for a in ("name", "mixer_class")):
            raise PluginError(
                f"plugin {plugin!r}: sspruner_families returned {family!r}, not an object of a subclass of "
                "sspruner.Family with name and mixer_class"
            )
        for claim in (f"family {family.name!r}", f"mixer class {family.mixer_class!r}"):
            if claim in origin:
                raise PluginError(f"{claim}: described by plugin {origin[claim]!r} and by {plugin!r}; remove one")
            origin[claim] = plugin
        families[family.name] = family
    return families
