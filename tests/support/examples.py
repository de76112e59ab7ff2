"""How many examples property tests draw, in proportion to the profile (conftest.py)."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import settings

USUAL = 25  # examples of the profile `ci`, for which the tests state their numbers
SCALE = settings.default.max_examples / USUAL  # type: ignore[union-attr]


def scaled(count: int) -> int:
    """So many examples in the profile `ci`; fewer, but at least one, in `fast`; more in `deep`."""
    return max(1, math.ceil(count * SCALE - 1e-9))


def examples(count: int, **options: Any) -> settings:
    """`settings(max_examples=...)` for a test that takes `count` examples in CI."""
    return settings(max_examples=scaled(count), **options)
