"""Folders with adapters (peft): merged into their base model on request, refused by name otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sspruner.errors import InputError, ModelError, install
from sspruner.io.source import ADAPTER, brief


def holds_adapter(folder: Path) -> bool:
    """Check whether a folder holds an adapter, alone or beside a model."""
    return (folder / ADAPTER).is_file()


def base_of(where: str) -> str:
    """Return the name of the model that an adapter belongs to. Raises ModelError if its config does not say it."""
    try:
        name = json.loads((Path(where) / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"model {where}: {ADAPTER} cannot be read: {brief(error)}") from error
    if not isinstance(name, str) or not name:
        raise ModelError(f"model {where}: {ADAPTER} names no base model (base_model_name_or_path)")
    return name


def merged(where: str, load_base: Callable[[str], Any]) -> Any:
    """Load an adapter's base model and merge the adapter into its weights.

    Raises InputError without peft, ModelError for an adapter that does not fit, or that is not finite once merged.
    """
    try:
        from peft import PeftModel
    except ImportError:
        raise InputError(f"model {where}: merging an adapter needs peft: {install('train')}") from None
    base = load_base(base_of(where))
    try:
        model = PeftModel.from_pretrained(base, where).merge_and_unload(safe_merge=True)
    except Exception as error:  # peft raises many types for an adapter that does not fit
        raise ModelError(f"model {where}: its adapter cannot be merged: {brief(error)}") from error
    return model.eval()
