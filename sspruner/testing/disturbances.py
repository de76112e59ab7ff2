"""Disturbances of a scorer under test: degenerate models, perturbed weights, other random states."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sspruner.graph.trace import trace
from sspruner.testing.plans import zero_units


def _same_embeddings(model: Any, axes: list[str]) -> None:
    weight = model.get_input_embeddings().weight
    weight.copy_(weight[:1].clone().expand_as(weight))


def _dead_units(model: Any, axes: list[str]) -> None:
    graph = trace(model)
    for axis in axes:
        for group in graph.on_axis(axis).values():
            if group.tensor:
                model.get_parameter(group.tensor)[:, 0] = 0
            zero_units(model, group, [0])
            for name in group.blocks[0].writers if group.blocks else ():
                model.get_parameter(name).zero_()


def _silence(model: Any, axes: list[str]) -> None:
    for parameter in model.get_submodule(trace(model).blocks).parameters():
        parameter.zero_()


DEGENERATE: dict[str, Callable[[Any, list[str]], None]] = {
    "where every token has the same embedding": _same_embeddings,
    "where one unit of every set is dead": _dead_units,
    "where all weights of the blocks are 0": _silence,
}


@torch.no_grad()
def perturbed(model: Any, size: float, seed: int) -> Any:
    """Return the model after random relative changes of its weights."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.mul_(1 + size * torch.randn(parameter.shape, generator=generator))
    return model


def disturb_random_state(seed: int) -> None:
    """Seed every global random number generator."""
    torch.manual_seed(seed)
    random.seed(seed)


@contextmanager
def one_thread() -> Iterator[None]:
    """Context manager: one thread, so that equal results are equal to the bit; restores the random state."""
    threads, state = torch.get_num_threads(), copy.copy(random.getstate())
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)
        random.setstate(state)
