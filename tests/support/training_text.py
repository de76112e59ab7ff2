"""Files of training text."""

from __future__ import annotations

import os
import random
from pathlib import Path


def sources(folder: Path) -> tuple[str, ...]:
    """Write two texts of different letters, and return their paths."""
    for name, letters in (("a.txt", "abcdef"), ("b.txt", "uvwxyz")):
        rng = random.Random(name)
        file, whole = folder / name, folder / f"{name}.{os.getpid()}"
        whole.write_text("".join(rng.choice(letters) for _ in range(200)), encoding="utf-8")
        whole.replace(file)  # several processes write the same text, and none may read half of it
    return tuple(str(folder / name) for name in ("a.txt", "b.txt"))
