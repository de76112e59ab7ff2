"""Install the faster CPU decode step (runtime.decode_step) in all mixers of a model that support it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from sspruner.errors import ModelError
from sspruner.runtime.decode_step import can_step, has_step, install_step, remove_step

Model = TypeVar("Model")


def accelerate(model: Model) -> Model:
    """Speed up decoding on the CPU; results differ by rounding only. The model is changed in place and returned.

    Only steps of one token with a cache and without gradients change; prefill, training, other devices and compiled
    models run their usual code. Weights, config and saved files are unchanged. A projection made later replaces the
    step: call this again after it. Raises ModelError for a model without Mamba2-type mixers of transformers.
    """
    mixers = [module for module in _modules(model) if can_step(module)]
    if not mixers:
        raise ModelError(f"{type(model).__name__}: has no Mamba2-type mixer of transformers; there is no faster step")
    for mixer in mixers:
        install_step(mixer)
    return model


def decelerate(model: Model) -> Model:
    """Undo `accelerate`. Does nothing on a model that was not accelerated."""
    for module in _modules(model):
        remove_step(module)
    return model


@contextmanager
def accelerating(model: Any) -> Iterator[None]:
    """Context manager that installs the faster step in all mixers that support it."""
    mixers = [module for module in _modules(model) if can_step(module) and not has_step(module)]
    try:
        for mixer in mixers:
            install_step(mixer)
        yield
    finally:
        for mixer in mixers:
            remove_step(mixer)


def accelerated(model: Any) -> bool:
    """Return whether all mixers that support the faster step have it, and there is at least one."""
    mixers = [module for module in _modules(model) if can_step(module)]
    return bool(mixers) and all(map(has_step, mixers))


def _modules(model: Any) -> list[Any]:
    return list(model.modules())
