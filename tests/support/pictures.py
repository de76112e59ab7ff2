"""The pictures of docs/figures, and the scripts that draw them."""

from __future__ import annotations

import runpy
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from support.paths import ROOT

FIGURES = ROOT / "docs/figures"


def script(name: str) -> dict[str, Any]:
    """Return what a script of docs/figures defines. It imports modules from its own folder."""
    sys.path.insert(0, str(FIGURES))
    try:
        return runpy.run_path(str(FIGURES / f"{name}.py"))
    finally:
        sys.path.remove(str(FIGURES))
        sys.modules.pop("paper", None)


def check_drawn(folder: Path, name: str) -> None:
    """Check that the pictures in a folder are those of docs/figures."""
    for paper in ("light", "dark"):
        drawn, new = ((at / f"{name}-{paper}.svg").read_text(encoding="utf-8") for at in (FIGURES, folder))
        if f"Matplotlib v{version('matplotlib')}," in drawn:  # another one may draw another outline
            assert new == drawn
