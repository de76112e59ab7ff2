"""Number of examples that property tests draw, in proportion to the profile (conftest.py)."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import settings

USUAL = 25  # examples of a property test: the numbers that tests state are in proportion to it
SCALE = settings.default.max_examples / USUAL  # type: ignore[union-attr]


def scaled(count: int) -> int:
    """Return the number of examples: fewer than `count`, but at least one, in `fast`, more in `deep`."""
    return max(1, math.ceil(count * SCALE - 1e-9))


def examples(count: int, **options: Any) -> settings:
    """Return `settings(max_examples=scaled(count))`."""
    return settings(max_examples=scaled(count), **options)
