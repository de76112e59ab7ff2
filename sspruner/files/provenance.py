"""Provenance of a result: versions, peak memory, and the hub name of a model."""

from __future__ import annotations

import platform
import resource
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    return {"python": platform.python_version(), **_packages()}


@cache
def _packages() -> dict[str, str]:
    return {name: version(name) for name in ("sspruner", "torch", "transformers", "safetensors")}


def peak_memory_bytes() -> int:
    """Return the peak resident memory of this process, plus the peak that torch allocated on the GPU, if any."""
    scale = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    return resident + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


def hub_name(model: Any) -> str:
    """Return the hub name that a model was loaded from, "" if it came from elsewhere."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    name = str(getattr(getattr(model, "config", None), "name_or_path", "") or "")
    if not name or Path(name).exists():
        return ""
    try:
        return name if isinstance(try_to_load_from_cache(name, "config.json"), str) else ""
    except HFValidationError:  # a path that no longer exists
        return ""
