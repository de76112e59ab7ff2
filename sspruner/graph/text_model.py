"""The language model inside a multimodal one: its config, and where it lies."""

from __future__ import annotations

from typing import Any

from torch import nn


def text_config(config: Any) -> Any:
    """Return the part of a config that holds the sizes of the language model; the config itself if it has no parts."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def text_path(model: nn.Module) -> str:
    """Return the path of the language model inside a multimodal one, "" for a model that is nothing else."""
    config: Any = getattr(model, "config", None)
    if text_config(config) is config or not hasattr(model, "get_decoder"):
        return ""
    text = model.get_decoder()  # type: ignore[operator]
    return next((path for path, module in model.named_modules() if module is text), "")
