"""Copies of cut models: by deepcopy, pickle, torch.save and between processes they compute the same, on their own."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch

import sspruner
from support.projected import every_state
from support.round_trip import GREEDY
from support.tiny import half, logits, tokens
from support.zoo import zoo


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def sent(model: Any) -> Any:
    """As to a process of multiprocessing, without starting one."""
    return pickle.loads(ForkingPickler.dumps(model))


def cut(family: str, axis: str, mode: str) -> Any:
    model = zoo(family)
    return sspruner.apply(model, half(sspruner.trace(model), axis), mode=mode)


def projected(mode: str) -> Any:
    model = zoo("mamba2")
    return sspruner.apply(model, every_state(sspruner.trace(model)), mode=mode)


MODELS: dict[str, Callable[[], Any]] = {
    "sliced": lambda: cut("zamba2", "head", "slice"),
    "masked": lambda: cut("mamba", "state", "mask"),
    "without mixers": lambda: cut("bamba", "mixer", "slice"),
    "with masked mixers": lambda: cut("bamba", "mixer", "mask"),
    "projected": lambda: projected("slice"),
    "masked by a projection": lambda: projected("mask"),
    "accelerated": lambda: sspruner.accelerate(zoo("mamba2")),
    "projected and accelerated": lambda: sspruner.accelerate(projected("slice")),
}


@pytest.mark.cover(most=9)
@pytest.mark.parametrize("how", [copy.deepcopy, saved, sent], ids=["deepcopy", "torch.save", "sent"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_copy_computes_the_same_and_is_on_its_own(kind: str, how: Callable[[Any], Any]) -> None:
    model, ids = MODELS[kind](), tokens(2, 9)
    greedy: dict[str, Any] = {**GREEDY, "attention_mask": torch.ones_like(ids)}
    expected, text = logits(model, ids), model.generate(ids, **greedy)
    found = how(model)
    assert torch.equal(logits(found, ids), expected)
    assert torch.equal(found.generate(ids, **greedy), text)
    with torch.no_grad():
        for p in found.parameters():
            p.data = p.data * 1.5  # of its own: a model that was sent shares its memory until then
    assert torch.equal(logits(model, ids), expected)
    assert not torch.equal(logits(found, ids), expected)


@pytest.mark.parametrize("how", [copy.deepcopy, saved], ids=["deepcopy", "torch.save"])
@pytest.mark.parametrize("kind", ["masked", "with masked mixers", "masked by a projection"])
def test_the_mask_of_a_copy_comes_off_alone(kind: str, how: Callable[[Any], Any]) -> None:
    model, ids = MODELS[kind](), tokens(2, 9)
    masked = logits(model, ids)
    found = how(model)  # what is sent between processes shares its memory, as torch says
    sspruner.unmask(found)
    assert not torch.equal(logits(found, ids), masked)
    assert torch.equal(logits(model, ids), masked)
    sspruner.unmask(model)
    assert torch.equal(logits(model, ids), logits(found, ids))
