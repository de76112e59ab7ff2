"""After any error of a cut the model is what it was: every bit, every shape, every field of its config."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner.plans.reduction import Selection
from sspruner.pruning import refit as refitting
from sspruner.surgery import proof
from sspruner.testing.plans import plans
from support.examples import examples
from support.tiny import tokens
from support.zoo import zoo, zoo_models


class Stop(Exception):
    """What goes wrong."""


def stopped(*args: Any, **kwargs: Any) -> Any:
    raise Stop


def after(count: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """A function that works `count` times, then fails."""
    calls = iter(range(count))

    def function(*args: Any, **kwargs: Any) -> Any:
        if next(calls, None) is None:
            raise Stop
        return real(*args, **kwargs)

    return function


def appearance(model: Any) -> dict[str, Any]:
    """Everything about a model that a cut may change."""
    return {
        "tensors": {name: value.clone() for name, value in model.state_dict(keep_vars=True).items()},
        "identities": {name: id(value) for name, value in model.state_dict(keep_vars=True).items()},
        "modules": {name: type(module) for name, module in model.named_modules()},
        "numbers": {
            name: {k: copy.copy(v) for k, v in vars(module).items() if isinstance(v, int | float | str | tuple)}
            for name, module in model.named_modules()
        },
        "config": model.config.to_dict(),
        "forwards": {name: "forward" in vars(module) for name, module in model.named_modules()},
    }


def assert_as_before(model: Any, before: dict[str, Any]) -> None:
    now = appearance(model)
    tensors, expected = now.pop("tensors"), before["tensors"]
    assert now == {name: value for name, value in before.items() if name != "tensors"}
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in tensors.items())


STEPS = (
    "write_for_good",
    "_check_written",
    "project_states",
    "slice_model",
    "record",
    "measured_state_bytes",
    "relative",
)


@examples(25)
@given(zoo_models(), st.sampled_from(STEPS), st.integers(0, 2), st.sampled_from(["float32", "bfloat16"]), st.data())
def test_a_cut_that_fails_at_any_step(
    model: torch.nn.Module, step: str, count: int, dtype: str, data: st.DataObject
) -> None:
    model = model.to(getattr(torch, dtype))
    if data.draw(st.booleans()):
        sspruner.apply(model, data.draw(plans(sspruner.trace(model))))  # a model that was cut before
    plan, before = data.draw(plans(sspruner.trace(model))), appearance(model)
    ids = tokens(2, 9)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, step, after(count, getattr(proof, step)))
        try:
            sspruner.apply(model, plan)
        except Stop:
            assert_as_before(model, before)
            with torch.no_grad():
                assert torch.equal(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize(
    "options", [{"scorer": "ghost"}, {"scorer": "balanced"}, {"scorer": "wanda", "axis": "weight"}]
)
def test_a_proof_that_fails(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo("mamba2")
    before = appearance(model)
    monkeypatch.setattr(proof, "TOLERANCE", -1.0)
    monkeypatch.setattr(proof, "SLACK", -1.0)
    with pytest.raises(sspruner.ProofError):
        sspruner.prune(model, sparsity=0.5, calibration=tokens(8, 40), **options)
    assert_as_before(model, before)
    monkeypatch.undo()
    assert sspruner.prune(model, sparsity=0.5, calibration=tokens(8, 40), **options).report.proof


@pytest.mark.parametrize("kind", ["output", "bias"])
def test_a_refit_that_fails(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo("mamba2")
    before = appearance(model)
    monkeypatch.setattr(refitting, "_solve", after(1, refitting._solve))
    with pytest.raises(Stop):
        sspruner.prune(model, "magnitude", sparsity=0.5, refit=kind, calibration=tokens(8, 40))
    assert_as_before(model, before)


class Broken(sspruner.Scorer):
    """Fails in the second layer that it sees."""

    name, axes, needs = "broken", {"state"}, "activations"

    def observe(self, view: sspruner.SSMView) -> None:
        if ".1." in view.group.layer:
            raise Stop

    def importance(self) -> torch.Tensor:
        return torch.arange(16.0).repeat(2, 1)


@pytest.mark.parametrize("one_shot", [False, True])
def test_a_scorer_that_fails(one_shot: bool) -> None:
    model = zoo("mamba2")
    before = appearance(model)
    with pytest.raises(sspruner.PluginError):
        sspruner.prune(model, Broken, sparsity=0.5, one_shot=one_shot, calibration=tokens(8, 40))
    assert_as_before(model, before)
    with pytest.raises(sspruner.PluginError):
        sspruner.score(model, Broken, calibration=tokens(8, 40))
    assert_as_before(model, before)


def test_new_values_are_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are written in place, also where a tensor keeps its size."""
    model = zoo("mamba2")
    name, weight = next((n, p) for n, p in model.named_parameters() if n.endswith("out_proj.weight"))
    before = appearance(model)
    group, units = next((g.name, g.units) for g in sspruner.trace(model).groups.values() if g.axis == "state")
    cut = {group: Selection(units, (tuple(range(1, units)),) * 2)}
    monkeypatch.setattr(proof, "_check_written", stopped)
    with pytest.raises(Stop):
        sspruner.apply(model, sspruner.Plan(cut, updates={name: torch.ones_like(weight)}))
    assert_as_before(model, before)
