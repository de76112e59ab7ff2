"""Read and write recipes as YAML. Unknown keys are errors that name the key's path and the nearest known key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from sspruner.errors import InputError
from sspruner.files.output import atomic_file

Kind = TypeVar("Kind")


def read(kind: type[Kind], path: str | Path) -> Kind:
    """Read a dataclass from a YAML file. Raises InputError for a file, a key or a value that does not fit."""
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"recipe {path}: cannot be read ({error.strerror or error})") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"recipe {path}: not YAML ({' '.join(str(error).split())})") from error
    try:
        return from_data(kind, {} if data is None else data)
    except InputError as error:
        raise InputError(f"recipe {path}: {error}") from error


def from_data(kind: type[Kind], data: Any) -> Kind:
    """Make a dataclass of dataclasses from mappings, its types checked by pydantic.

    Raises InputError that names the key's path, what is wrong with it, and the nearest key of a misspelt one.
    """
    from pydantic import TypeAdapter, ValidationError

    check_keys(kind, data, ())
    try:
        made: Kind = TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        if isinstance(cause := first.get("ctx", {}).get("error"), InputError):
            raise cause from error
        where = ".".join(
            str(part) for part in first["loc"] if not str(part).startswith(("function", "dict[", "tuple["))
        )
        raise InputError(f"{where}: {first['msg']} (it is {first['input']!r})") from error
    return made


def check_keys(kind: Any, data: Any, path: tuple[str, ...]) -> None:
    """Raise InputError for a key that is no field of the dataclass `kind`, at any depth."""
    where = ".".join(path)
    if not isinstance(data, Mapping):
        raise InputError(f"{where or 'the file'}: expected keys and values, not {data!r}")
    known = {f.name: f.default_factory for f in fields(kind)}
    for key, value in data.items():
        if key not in known:
            raise InputError(f"unknown key {'.'.join([*path, str(key)])}{nearest(str(key), known)}")
        if is_dataclass(known[key]):
            check_keys(known[key], value, (*path, key))


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'sparsity'?` where a known name is near, else the list of known names."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def to_data(recipe: Any) -> dict[str, Any]:
    """A dataclass of dataclasses as mappings: every field that has a value; a scorer class by its name."""
    found = {}
    for f in fields(recipe):
        value = getattr(recipe, f.name)
        if is_dataclass(value):
            value = to_data(value)
        elif isinstance(value, type):
            value = value.name  # type: ignore[attr-defined]
        elif isinstance(value, tuple):
            value = [one.name if isinstance(one, type) else one for one in value]  # type: ignore[attr-defined]
        elif isinstance(value, Mapping):
            value = dict(value)
        if value is not None and value != {} and value != []:
            found[f.name] = value
    return found


def write(recipe: Any, path: str | Path) -> None:
    """Write a recipe as YAML: it appears whole or not at all."""
    import yaml

    with atomic_file(path) as temporary:
        temporary.write_text(yaml.safe_dump(to_data(recipe), sort_keys=False, allow_unicode=True), encoding="utf-8")
