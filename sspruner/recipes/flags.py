"""How a field of a recipe is an option of the command line, and which texts it is read from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, get_type_hints

from cyclopts import UNSET, Group, Parameter

from sspruner.errors import InputError

REMOVE = Group("What to remove", sort_key=1)
AMOUNT = Group("How much", sort_key=2)
METHOD = Group("Method", sort_key=3)
CALIBRATION = Group("Calibration", sort_key=4)
TARGET = Group("Target", sort_key=5)


@dataclass(frozen=True)
class FromText:
    """Annotation of a field that may be given as text: how to read it. Values that are no text pass as they are.

    `read` takes the value and the name of the option that its errors name. The constructor of the dataclass applies it
    (see `read_texts`), and pydantic before it checks the type.
    """

    read: Callable[[Any, str], Any]
    option: str

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        """The schema of the type, after reading. Errors of YAML files name the key, not the option.

        `yaml.from_data` is known by its context. Once pydantic is imported, cyclopts validates options with it, too.
        """
        from pydantic_core import PydanticCustomError, core_schema

        def read(value: Any, info: Any) -> Any:
            try:
                return self.read(value, self.option)
            except InputError as error:
                if not info.context:
                    raise
                message = str(error).removeprefix(self.option)
                raise PydanticCustomError("text", "{message}", {"message": message}) from error

        return core_schema.with_info_before_validator_function(read, handler(source))


def read_texts(made: Any) -> None:
    """Read the fields of a frozen dataclass that were given as texts; call it first in `__post_init__`."""
    kind: Any = type(made)
    for name, reader in _readers(kind).items():
        object.__setattr__(made, name, reader.read(getattr(made, name), reader.option))


@cache
def _readers(kind: Any) -> dict[str, FromText]:
    """Field -> how it is read, of a dataclass."""
    hints = get_type_hints(kind, include_extras=True)
    found = {}
    for f in fields(kind):
        for note in getattr(hints[f.name], "__metadata__", ()):
            if isinstance(note, FromText):
                found[f.name] = note
    return found


def text(metavar: str, name: str | None = None, default: str | None = None) -> Parameter:
    """An option that takes one text, which the dataclass reads.

    default: what the help shows as the default; leave it out where the field's own default says it.
    """
    return Parameter(name=name, metavar=metavar, converter=_text, n_tokens=1, accepts_keys=False, **_shown(default))


def texts(metavar: str, name: str | None = None) -> Parameter:
    """An option that may be given several times, a text each, which the dataclass reads."""
    return Parameter(
        name=name, metavar=metavar, converter=_texts, n_tokens=-1, accepts_keys=False, consume_multiple=False
    )


def whole(name: str | None = None, default: str | None = None, metavar: str = "N") -> Parameter:
    """An option that takes a whole number."""
    return Parameter(name=name, metavar=metavar, converter=_whole, n_tokens=1, **_shown(default))


def number(metavar: str = "NUMBER", name: str | None = None, default: str | None = None) -> Parameter:
    """An option that takes a number."""
    return Parameter(name=name, metavar=metavar, converter=_number, n_tokens=1, **_shown(default))


def _shown(default: str | None) -> dict[str, Any]:
    return {} if default is None else {"show_default": default}


def _text(kind: Any, tokens: Any) -> Any:
    """The text of the token, or the value that a recipe file gives."""
    token = tokens[-1]
    return token.value if token.implicit_value is UNSET else token.implicit_value


def _texts(kind: Any, tokens: Any) -> Any:
    """The text of each token, or the value that a recipe file gives."""
    return _text(kind, tokens) if tokens[-1].implicit_value is not UNSET else tuple(token.value for token in tokens)


def _whole(kind: Any, tokens: Any) -> Any:
    given = _text(kind, tokens)
    try:
        return int(given)
    except ValueError:
        raise ValueError(f"{given!r} is not a whole number") from None


def _number(kind: Any, tokens: Any) -> Any:
    given = _text(kind, tokens)
    try:
        return float(given)
    except ValueError:
        raise ValueError(f"{given!r} is not a number") from None
