"""Recipe: everything that decides a cut and nothing about the machine; the argument of `prune`, and a YAML file."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from cyclopts import Parameter

from sspruner.errors import InputError
from sspruner.recipes.parts import Budget, CalibrationText, Elements, Limits, Method, Remove, Target
from sspruner.recipes.yaml import nearest, read, to_data, write

#: The calibration text may also be given as `calibration=`, as on the command line.
_SHORT = {"calibration": "source", "target": "runtime"}


@Parameter(name="*")
@dataclass(frozen=True)
class Recipe:
    """What to remove, how much, by which method, on which text, and for which runtime.

    `Recipe.load("r.yaml")` reads one, `recipe.save("r.yaml")` writes one; `Recipe.of("ghost", sparsity=0.5)` makes one
    from the fields of its parts, whichever part they are in.
    """

    remove: Remove = field(default_factory=Remove)
    elements: Elements = field(default_factory=Elements)
    budget: Budget = field(default_factory=Budget)
    limits: Limits = field(default_factory=Limits)
    method: Method = field(default_factory=Method)
    calibration: CalibrationText = field(default_factory=CalibrationText)
    target: Target = field(default_factory=Target)

    @classmethod
    def of(cls, scorer: Any = None, **short: Any) -> Recipe:
        """Make a recipe from the fields of its parts: `Recipe.of("ghost", axis="head", sparsity=0.5)`.

        limits: a `Limits`, or leave it out and give its fields. Raises InputError for an unknown field, with the
        nearest known one.
        """
        given = {"scorer": scorer, **short} if scorer is not None else dict(short)
        whole = {name: given.pop(name) for name in ("limits",) if given.get(name) is not None}
        given.pop("limits", None)
        parts: dict[str, Any] = {}
        for part in fields(cls):
            kind: Any = part.default_factory
            names = {f.name: f.name for f in fields(kind)}
            names |= {short_name: name for short_name, name in _SHORT.items() if name in names}
            values = {names[name]: given.pop(name) for name in list(given) if name in names}
            if values:
                parts[part.name] = kind(**{name: value for name, value in values.items() if value is not None})
        if given:
            known = [f.name for part in fields(cls) for f in fields(part.default_factory)]  # type: ignore[arg-type]
            unknown = next(iter(given))
            raise InputError(f"unknown argument {unknown!r}{nearest(unknown, [*known, *_SHORT])}")
        return cls(**parts | whole)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe from a YAML file. Raises InputError that names the file, the key's path and the nearest key."""
        return read(cls, path)

    def save(self, path: str | Path) -> None:
        """Write the recipe as YAML, atomically: every field that has a value, defaults included."""
        write(self, path)

    def to_json(self) -> dict[str, Any]:
        """The recipe as report.json holds it: every field that has a value."""
        return to_data(self)
