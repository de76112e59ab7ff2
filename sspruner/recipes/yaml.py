"""Read and write recipes as YAML. Unknown keys are errors that name the key's path and the nearest known key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from sspruner.errors import InputError

Kind = TypeVar("Kind")


def read(kind: type[Kind], path: str | Path) -> Kind:
    """Read a dataclass from a YAML file. Raises InputError for a file, a key or a value that does not fit."""
    import yaml

    try:
        data = _parsed(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"recipe {path}: cannot be read ({error.strerror or error})") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"recipe {path}: not YAML ({' '.join(str(error).split())})") from error
    try:
        return from_data(kind, {} if data is None else data)
    except InputError as error:
        raise InputError(f"recipe {path}: {error}") from error


def _parsed(text: str) -> Any:
    """Parse a YAML document. Raises a YAMLError also for a key that a mapping has twice."""
    import yaml

    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_once(node)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _check_once(node: Any) -> None:
    import yaml

    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if str(key.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} is there twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
            _check_once(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_once(value)


def from_data(kind: type[Kind], data: Any) -> Kind:
    """Build a dataclass of dataclasses from mappings, with types checked by pydantic. null values are left out.

    Raises InputError that names the key's path, what is wrong with its value, and the nearest key of a misspelt one.
    """
    from pydantic import TypeAdapter, ValidationError

    check_keys(kind, data, ())
    try:
        built: Kind = TypeAdapter(kind).validate_python(_without_nulls(data), context={"from": "yaml"})
    except ValidationError as error:
        raise InputError(_explained(error.errors(), data)) from error
    return built


def check_keys(kind: Any, data: Any, path: tuple[str, ...]) -> None:
    """Raise InputError for a key that is not a field of the dataclass `kind`, at any depth, and for a bool as a number.

    Pydantic accepts true as 1.
    """
    where = ".".join(path)
    if not isinstance(data, Mapping):
        raise InputError(f"{where or 'the file'}: expected keys and values, not {_as_yaml(data)}")
    known = {f.name: f for f in fields(kind)}
    for key, value in data.items():
        if key not in known:
            raise InputError(f"unknown key {'.'.join([*path, str(key)])}{nearest(str(key), known)}")
        part = known[key].default_factory
        if is_dataclass(part):
            check_keys(part, {} if value is None else value, (*path, key))
        elif isinstance(value, bool) and not isinstance(known[key].default, bool):
            raise InputError(f"{'.'.join([*path, key])}: expected no {_as_yaml(value)}; write a word in quotes")


#: Type of pydantic's error -> what was expected, in words.
_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text; write it in quotes",
    "mapping_type": "keys and values",
    "dict_type": "keys and values",
    "tuple_type": "a list",
    "list_type": "a list",
}


def _explained(errors: list[Any], data: Any) -> str:
    """Return the error that is deepest in the data, as one line.

    Of a union, pydantic reports one error for each type.
    """
    paths = [_path(error["loc"], data) for error in errors]
    error, path = max(zip(errors, paths, strict=True), key=lambda pair: len(pair[1]))
    where = ".".join(map(str, path))
    if error["type"] == "text":
        return f"{where}{error['msg']}"
    alike = [_EXPECTED.get(e["type"], e["msg"]) for e, other in zip(errors, paths, strict=True) if other == path]
    return f"{where} {_as_yaml(error['input'])}: expected {' or '.join(dict.fromkeys(alike))}"


def _path(location: tuple[Any, ...], data: Any) -> tuple[Any, ...]:
    """Return the keys in pydantic's location that lead to a value in the data; the others name types."""
    path: list[Any] = []
    for part in location:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            continue
        path.append(part)
    return tuple(path)


def _as_yaml(value: Any) -> str:
    """Return a value in YAML notation."""
    import yaml

    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
    return text.strip().removesuffix("...").strip()


def _without_nulls(data: Any) -> Any:
    if not isinstance(data, Mapping):
        return data
    return {key: _without_nulls(value) for key, value in data.items() if value is not None}


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'sparsity'?` if a known name is near, else the list of known names."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def to_data(recipe: Any) -> dict[str, Any]:
    """Return a dataclass of dataclasses as mappings: every field that has a value; a scorer class by its name."""
    data = {}
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
            data[f.name] = value
    return data


def write(recipe: Any, path: str | Path) -> None:
    """Write a recipe as YAML, atomically."""
    from sspruner.files.output import write_file

    write_file(path, as_yaml(to_data(recipe)))


def as_yaml(data: Mapping[str, Any]) -> str:
    """Return the mappings of a recipe as YAML."""
    import yaml

    text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return text
