"""Fields of recipes as options of the command line, and their parsing from text."""

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
    """Annotation of a field that may be given as text. Values that are not text are passed on unchanged.

    `read` takes the value and the name of the option, for its errors. The constructor of the dataclass applies it (see
    `read_texts`), and pydantic before it checks the type.
    """

    read: Callable[[Any, str], Any]
    option: str

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        """Return the schema of the type, applied after reading. Errors of YAML files name the key instead of the
        option.

        The context tells a call from `yaml.from_data`: cyclopts validates with pydantic, too, once that is imported.
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


def read_texts(instance: Any) -> None:
    """Read the fields of a frozen dataclass that were given as texts; call it first in `__post_init__`."""
    kind: Any = type(instance)
    for name, reader in _readers(kind).items():
        object.__setattr__(instance, name, reader.read(getattr(instance, name), reader.option))


@cache
def _readers(kind: Any) -> dict[str, FromText]:
    """Return the readers of a dataclass: field -> its annotation."""
    hints = get_type_hints(kind, include_extras=True)
    readers = {}
    for f in fields(kind):
        for note in getattr(hints[f.name], "__metadata__", ()):
            if isinstance(note, FromText):
                readers[f.name] = note
    return readers


def text(metavar: str, name: str | None = None, default: str | None = None) -> Parameter:
    """Return an option that takes one text, which the dataclass reads.

    default: shown in the help; leave it out if the field's own default is clear.
    """
    return Parameter(name=name, metavar=metavar, converter=_text, n_tokens=1, accepts_keys=False, **_shown(default))


def texts(metavar: str, name: str | None = None) -> Parameter:
    """Return an option that may be repeated, each time with one text, which the dataclass reads."""
    return Parameter(
        name=name, metavar=metavar, converter=_texts, n_tokens=-1, accepts_keys=False, consume_multiple=False
    )


def whole(name: str | None = None, default: str | None = None, metavar: str = "N") -> Parameter:
    """Return an option that takes a whole number."""
    return Parameter(name=name, metavar=metavar, converter=_whole, n_tokens=1, **_shown(default))


def number(metavar: str = "NUMBER", name: str | None = None, default: str | None = None) -> Parameter:
    """Return an option that takes a number."""
    return Parameter(name=name, metavar=metavar, converter=_number, n_tokens=1, **_shown(default))


def _shown(default: str | None) -> dict[str, Any]:
    return {} if default is None else {"show_default": default}


def _text(kind: Any, tokens: Any) -> Any:
    """Return the text of the last token, or the value from a recipe file."""
    token = tokens[-1]
    return token.value if token.implicit_value is UNSET else token.implicit_value


def _texts(kind: Any, tokens: Any) -> Any:
    """Return the text of each token, or the value from a recipe file."""
    return _text(kind, tokens) if tokens[-1].implicit_value is not UNSET else tuple(token.value for token in tokens)


def _whole(kind: Any, tokens: Any) -> Any:
    value = _text(kind, tokens)
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"{value!r} is not a whole number") from None


def _number(kind: Any, tokens: Any) -> Any:
    value = _text(kind, tokens)
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{value!r} is not a number") from None
