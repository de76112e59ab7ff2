"""Shared parts of recipes: YAML input and output, and short forms with all fields as keyword arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from sspruner.errors import InputError
from sspruner.recipes.yaml import nearest, read, to_data, write

Kind = TypeVar("Kind")

#: Name of the recipe's file in a folder of results.
FILE = "recipe.yaml"


class Composed:
    """Base of dataclasses whose fields are dataclasses themselves, the parts."""

    @classmethod
    def of(cls, **short: Any) -> Self:
        """Build from the fields of the parts: `DistilRecipe.of(alpha=0.9, max_tokens=10**6)`.

        Raises InputError for an unknown field, with the nearest known one.
        """
        return build(cls, short)


class Recorded(Composed):
    """Base of recipes that are read from YAML, written as YAML, and part of a record in JSON."""

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a recipe from a YAML file. Raises InputError that names the file, the key's path and the nearest key."""
        return read(cls, path)

    def save(self, path: str | Path) -> None:
        """Write the recipe as YAML, atomically: every field that has a value, defaults included."""
        write(self, path)

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as in report.json: every field that has a value."""
        return to_data(self)


def parts(kind: Any) -> dict[str, Any]:
    """Return the parts of a dataclass of dataclasses: key -> class."""
    return {f.name: f.default_factory for f in fields(kind) if is_dataclass(f.default_factory)}


def known_fields(kind: Any) -> set[str]:
    """Return the names of the fields of all parts, and the keys of the parts."""
    return {f.name for part in parts(kind).values() for f in fields(part)} | set(parts(kind))


def build(kind: type[Kind], short: Mapping[str, Any], aliases: Mapping[str, str] | None = None) -> Kind:
    """Build a dataclass of dataclasses from the fields of its parts, whichever part they are in.

    A whole part may also be passed by its key. `None` leaves a field at its default. Field names are unique over all
    parts.

    Args:
        short: fields by name.
        aliases: other names of fields, name -> field.

    Raises:
        InputError: for an unknown name, with the nearest known one, and for a field of a part that is passed whole.
    """
    aliases = aliases or {}
    whole = {key: short[key] for key, part in parts(kind).items() if isinstance(short.get(key), part)}
    remaining: dict[str, Any] = {}
    for name, value in short.items():
        if name not in whole and value is not None:
            remaining[aliases.get(name, name)] = value
    built: dict[str, Any] = {}
    for key, part in parts(kind).items():
        values = {f.name: remaining.pop(f.name) for f in fields(part) if f.name in remaining}
        if key in whole and values:
            raise InputError(f"{next(iter(values))}: is a field of {key}, which is given as a whole")
        built[key] = whole[key] if key in whole else part(**values)
    if remaining:
        unknown = next(iter(remaining))
        raise InputError(f"unknown argument {unknown!r}{nearest(unknown, [*known_fields(kind), *aliases])}")
    return kind(**built)


def recipe_or_short(
    kind: type[Kind], recipe: Any, short: Mapping[str, Any], aliases: Mapping[str, str] | None = None
) -> Kind:
    """Return a recipe unchanged, or build one from short arguments. Raises InputError for both at once."""
    if recipe is None:
        return build(kind, short, aliases)
    if not isinstance(recipe, kind):
        raise InputError(f"recipe: a {type(recipe).__name__}; expected a {kind.__name__}")
    if short:
        raise InputError(f"{next(iter(short))}: a recipe says this; change the recipe (dataclasses.replace)")
    return recipe
