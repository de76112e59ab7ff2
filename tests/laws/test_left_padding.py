"""Padding on the left, as for batches: without biases of in_proj it changes neither the dense model nor any cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from inspect import signature

import pytest
import torch
from transformers import PreTrainedModel

import sspruner
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Selection
from support.family_plans import AXES
from support.tiny import half, tokens
from support.zoo import rounding, zoo

PADDING, NEW = 5, 4

CASES = [(family, axis) for family, axes in AXES.items() for axis in axes if axis != "mixer"]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def unbiased(family: str) -> PreTrainedModel:
    model = zoo(family, hidden=16)
    for name, parameter in model.named_parameters():
        if name.endswith("in_proj.bias"):
            parameter.zero_()
    return model


def padding_changes(model: PreTrainedModel) -> tuple[float, bool]:
    """The largest change of a logit to the largest logit; whether greedy text changes."""
    ids, blank = tokens(2, 9), torch.zeros(2, PADDING, dtype=torch.long)
    mask = torch.cat([blank, torch.ones_like(ids)], 1)
    how = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": None}
    texts, scores = [], []
    for rows, seen in ((ids, torch.ones_like(ids)), (torch.cat([blank, ids], 1), mask)):
        places = (seen.cumsum(-1) - 1).clamp(0)
        more = {"position_ids": places} if "position_ids" in signature(type(model).forward).parameters else {}
        scores.append(model(input_ids=rows, attention_mask=seen, use_cache=False, **more).logits[:, -9:])
        texts.append(model.generate(rows, attention_mask=seen, **how)[:, -NEW:])
    change = (scores[1] - scores[0]).abs().max() / scores[0].abs().max()
    return float(change), not torch.equal(*texts)


@pytest.mark.ci_cover(families=4)
@pytest.mark.slow
@pytest.mark.parametrize(("family", "axis"), CASES)
def test_no_cut_makes_padding_count(family: str, axis: str) -> None:
    able = 0
    for plan in without_one(family) if axis == "block" else [half(sspruner.trace(zoo(family, hidden=16)), axis)]:
        model = unbiased(family)
        with suppress(sspruner.PlanError):  # the only attention, the only mixer
            sspruner.apply(model, plan)
            change, text = padding_changes(model)
            assert change < max(1e-4, 8 * rounding(model, tokens(2, 9)))
            assert not text
            able += 1
    assert able


def without_one(family: str) -> list[Plan]:
    """Plans that drop one block each, mixer, attention and MLP together."""
    ((name, group),) = sspruner.trace(zoo(family, hidden=16)).on_axis("block").items()
    every = range(group.units)
    return [Plan({name: Selection(group.units, (tuple(i for i in every if i != gone),))}) for gone in every]


def test_biases_of_in_proj_make_it_count_and_are_said_once() -> None:
    model = zoo("mamba2", hidden=16)
    assert padding_changes(model)[0] > 1e-2
    said = str(sspruner.trace(model))
    assert said.count("biases of in_proj: padding on the left enters the state") == 1
    assert "biases of in_proj" not in str(sspruner.trace(zoo("mamba2", hidden=16, bias=False)))
