"""Models on the meta device, and the memory of real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import sspruner
from sspruner.benchmarking.footprint import Footprint, footprint

CONTEXT = 19


def config_alone(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def taken(model: Any, context: int = CONTEXT) -> Footprint:
    return footprint(model, sspruner.trace(model), context)
