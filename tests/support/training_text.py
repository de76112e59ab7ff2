"""Files of training text."""

from __future__ import annotations

import random
from pathlib import Path


def sources(folder: Path) -> tuple[str, ...]:
    """Write two texts of different letters, and return their paths."""
    for name, letters in (("a.txt", "abcdef"), ("b.txt", "uvwxyz")):
        rng = random.Random(name)
        (folder / name).write_text("".join(rng.choice(letters) for _ in range(200)), encoding="utf-8")
    return tuple(str(folder / name) for name in ("a.txt", "b.txt"))
