"""What recipes have in common: YAML in and out, and a short form with the fields of all parts as keyword arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from sspruner.errors import InputError
from sspruner.recipes.yaml import nearest, read, to_data, write

Kind = TypeVar("Kind")

#: The name of the recipe in a folder that it made.
FILE = "recipe.yaml"


class Recorded:
    """A recipe that is read from YAML, written as YAML, and part of a record in JSON."""

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a recipe from a YAML file. Raises InputError that names the file, the key's path and the nearest key."""
        return read(cls, path)

    def save(self, path: str | Path) -> None:
        """Write the recipe as YAML, atomically: every field that has a value, defaults included."""
        write(self, path)

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as a record holds it: every field that has a value."""
        return to_data(self)


def parts(kind: Any) -> dict[str, Any]:
    """Return the parts of a dataclass of dataclasses: key -> class."""
    return {f.name: f.default_factory for f in fields(kind) if is_dataclass(f.default_factory)}


def known_fields(kind: Any) -> set[str]:
    """Return the names of the fields of all parts, and the keys of the parts."""
    return {f.name for part in parts(kind).values() for f in fields(part)} | set(parts(kind))


def made_of(kind: type[Kind], short: Mapping[str, Any], aliases: Mapping[str, str] | None = None) -> Kind:
    """Make a dataclass of dataclasses from the fields of its parts, whichever part they are in.

    A part may also be given whole, by its key. `None` leaves a field at its default. Fields of a later part do not
    hide those of an earlier one: no two parts have a field of the same name.

    Args:
        short: fields by name.
        aliases: other names of fields, name -> field.

    Raises:
        InputError: for an unknown name, with the nearest known one, and for a field of a part that is given whole.
    """
    aliases = aliases or {}
    whole = {key: short[key] for key, part in parts(kind).items() if isinstance(short.get(key), part)}
    given: dict[str, Any] = {}
    for name, value in short.items():
        if name not in whole and value is not None:
            given[aliases.get(name, name)] = value
    made: dict[str, Any] = {}
    for key, part in parts(kind).items():
        values = {f.name: given.pop(f.name) for f in fields(part) if f.name in given}
        if key in whole and values:
            raise InputError(f"{next(iter(values))}: is a field of {key}, which is given as a whole")
        made[key] = whole[key] if key in whole else part(**values)
    if given:
        unknown = next(iter(given))
        raise InputError(f"unknown argument {unknown!r}{nearest(unknown, [*known_fields(kind), *aliases])}")
    return kind(**made)


def recipe_or_short(
    kind: type[Kind], recipe: Any, short: Mapping[str, Any], aliases: Mapping[str, str] | None = None
) -> Kind:
    """Return a recipe as it is, or make one of short arguments. Raises InputError for both at once."""
    if recipe is None:
        return made_of(kind, short, aliases)
    if not isinstance(recipe, kind):
        raise InputError(f"recipe: a {type(recipe).__name__}; expected a {kind.__name__}")
    if short:
        raise InputError(f"{next(iter(short))}: a recipe says this; change the recipe (dataclasses.replace)")
    return recipe
