"""`accelerate`: the faster decode step (runtime.decode_step) for all mixers of a model that can have it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from sspruner.errors import ModelError
from sspruner.runtime.decode_step import can_step, has_step, install_step, remove_step

Model = TypeVar("Model")


def accelerate(model: Model) -> Model:
    """Decode faster on the CPU, with the same numbers up to rounding; the model is changed in place and returned.

    Only steps of one token with a cache and without gradients change; prefill, training, other devices and compiled
    models run the code that they ran before. Weights, config and what `save` writes stay as they are. A projection
    that is made later brings its own forward: call this again after it. Raises ModelError for a model without
    Mamba2-type mixers of transformers.
    """
    mixers = [module for module in _modules(model) if can_step(module)]
    if not mixers:
        raise ModelError(f"{type(model).__name__}: has no Mamba2-type mixer of transformers; there is no faster step")
    for mixer in mixers:
        install_step(mixer)
    return model


def decelerate(model: Model) -> Model:
    """Undo `accelerate`; a model that was not accelerated stays as it is."""
    for module in _modules(model):
        remove_step(module)
    return model


@contextmanager
def accelerating(model: Any) -> Iterator[None]:
    """The faster step inside the block, for those mixers that can have it; afterwards all is as it was."""
    mixers = [module for module in _modules(model) if can_step(module) and not has_step(module)]
    try:
        for mixer in mixers:
            install_step(mixer)
        yield
    finally:
        for mixer in mixers:
            remove_step(mixer)


def accelerated(model: Any) -> bool:
    """Whether all mixers of a model that can have the faster step have it, and there are some."""
    mixers = [module for module in _modules(model) if can_step(module)]
    return bool(mixers) and all(map(has_step, mixers))


def _modules(model: Any) -> list[Any]:
    return list(model.modules())
