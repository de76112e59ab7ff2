"""Recipe: all settings that decide a cut, and none about the machine; the argument of `prune`, and a YAML file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cyclopts import Parameter

from sspruner.recipes.common import Recorded, build
from sspruner.recipes.parts import (
    Budget,
    CalibrationText,
    Elements,
    Limits,
    Method,
    Reconstruction,
    Remove,
    Target,
)
from sspruner.recipes.serving import Serving

#: The calibration text may also be given as `calibration=`, as on the command line.
_SHORT = {"calibration": "source", "target": "runtime"}


@Parameter(name="*")
@dataclass(frozen=True)
class Recipe(Recorded):
    """What to remove, how much, by which method, on which text, and for which runtime and how it serves.

    `Recipe.load("r.yaml")` reads one, `recipe.save("r.yaml")` writes one; `Recipe.of("ghost", sparsity=0.5)` makes one
    from the fields of its parts, whichever part they are in.
    """

    remove: Remove = field(default_factory=Remove)
    elements: Elements = field(default_factory=Elements)
    budget: Budget = field(default_factory=Budget)
    limits: Limits = field(default_factory=Limits)
    method: Method = field(default_factory=Method)
    reconstruction: Reconstruction = field(default_factory=Reconstruction)
    calibration: CalibrationText = field(default_factory=CalibrationText)
    target: Target = field(default_factory=Target)
    serving: Serving = field(default_factory=Serving)

    @classmethod
    def of(cls, scorer: Any = None, **short: Any) -> Recipe:
        """Make a recipe from the fields of its parts: `Recipe.of("ghost", axis="head", sparsity=0.5)`.

        A whole part may also be passed: `limits=Limits(...)`. Raises InputError for an unknown field, with the nearest
        known one.
        """
        return build(cls, {"scorer": scorer, **short}, _SHORT)
