"""Examples: each once before any again, the held-out ones never; gradual pruning on them, exact restarts, refusals."""

from __future__ import annotations

from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner.errors import InputError
from sspruner.training.distil import distil
from sspruner.training.examples import Examples
from sspruner.training.gradual import GradualRecipe, Pruner, gradual
from sspruner.training.twist import twist
from support.examples import examples
from support.series import AHEAD, CHANNELS, STEPS, Classifier, Forecaster, config
from support.training import Stopped, metrics, same

HOW: dict[str, Any] = {"max_tokens": 6 * 8, "batch": 8, "at_once": 4, "learning_rate": 1e-2, "mask_every": 2}


def model_of(kind: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(config()).eval()


def data_of(kind: Any, held_out: int = 6, **more: Any) -> Examples:
    generator = torch.Generator().manual_seed(0)
    if kind is Classifier:
        tokens = torch.randint(11, (30, STEPS), generator=generator)
        return Examples({"input_ids": tokens, "labels": tokens[:, -1] % 5}, held_out, **more)
    values = torch.randn(30, STEPS, CHANNELS, generator=generator)
    return Examples({"values": values, "labels": values[:, -AHEAD:]}, held_out, **more)


@given(number=st.integers(2, 40), seed=st.integers(0, 3), data=st.data())
@examples(20)
def test_each_once_before_any_again_and_the_held_out_never(number: int, seed: int, data: st.DataObject) -> None:
    held_out, skip = data.draw(st.integers(1, number - 1)), data.draw(st.integers(0, 60))
    found = Examples({"values": torch.arange(number)}, held_out, seed)
    drawn = [int(block) for block in islice(found.training_blocks(), 3 * number)]
    once = number - held_out
    for start in range(0, len(drawn) - once + 1, once):
        assert sorted(drawn[start : start + once]) == [*range(held_out, number)]
    assert [int(block) for block in islice(found.training_blocks(skip), 5)] == [*map(int, islice(
        found.training_blocks(), skip, skip + 5))]  # fmt: skip
    assert found.held_out_blocks().flatten().tolist() == [*range(held_out)]
    numbers = torch.tensor([[number - 1], [0]])
    assert found.batch(numbers)["values"].tolist() == [number - 1, 0]


@pytest.mark.parametrize("kind", [Forecaster, Classifier])
@pytest.mark.parametrize("axis", ["weight", "state"])
def test_gradual_pruning_of_a_forecaster_and_a_classifier(kind: Any, axis: str, tmp_path: Path) -> None:
    model, data = model_of(kind), data_of(kind)
    before = sspruner.trace(model)
    model, plan, trained = gradual(model, data, tmp_path / "run", axis=axis, sparsity=0.5, **HOW)
    assert (trained.steps, trained.tokens, trained.perplexity) == (6, 48, None)
    assert trained.held_out_loss
    assert trained.held_out_loss[1] < trained.held_out_loss[0]
    assert metrics(tmp_path / "run")[-1]["held_out_loss"] == trained.held_out_loss[1]
    with torch.no_grad():
        every = data.loss(model, data.batch(data.held_out_blocks()))
    assert trained.held_out_loss[1] == pytest.approx(float(every), rel=1e-4)  # the cut model is the masked one
    if axis == "state":
        assert sspruner.trace(model).state_bytes * 2 == before.state_bytes
    else:
        removed = sum(int((~keep).sum()) for keep in plan.elements.values())
        assert removed == round(0.5 * sum(keep.numel() for keep in plan.elements.values()))
        zeros = {name: model.get_parameter(before.elements[name].tensor) == 0 for name in plan.elements}
        assert all(torch.equal(zeros[name], ~keep) for name, keep in plan.elements.items())


@pytest.mark.slow
def test_an_interrupted_run_ends_like_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gradual(model_of(Forecaster), data_of(Forecaster), tmp_path / "whole", every=2, **HOW | {"mask_every": 1})
    real = Pruner.__call__

    def stop(self: Pruner, step: int) -> None:
        real(self, step)
        if step == 5:
            raise Stopped

    recipe = GradualRecipe.of(**HOW | {"mask_every": 1})
    monkeypatch.setattr(Pruner, "__call__", stop)
    with suppress(Stopped):
        gradual(model_of(Forecaster), data_of(Forecaster), tmp_path / "stopped", recipe)
    monkeypatch.setattr(Pruner, "__call__", real)
    again = gradual(model_of(Forecaster), data_of(Forecaster), tmp_path / "stopped", recipe)
    assert same(whole[0], again[0])
    assert whole[2].held_out_loss == again[2].held_out_loss


def test_a_loss_of_the_users_own(tmp_path: Path) -> None:
    seen = []

    def absolute(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.append({name: len(array) for name, array in batch.items()})
        return (model(batch["values"])["logits"] - batch["labels"]).abs().mean()

    data = data_of(Forecaster, loss=absolute)
    trained = gradual(model_of(Forecaster), data, tmp_path / "run", **HOW)[2]
    assert trained.held_out_loss
    assert {"values": 4, "labels": 4} in seen
    assert data.identity()["loss"].endswith("absolute")
    assert data.identity() != data_of(Forecaster).identity()


@pytest.mark.parametrize(
    ("arrays", "held_out", "message"),
    [
        ({}, 1, "there are none"),
        ({"values": torch.zeros(3), "labels": torch.zeros(4)}, 1, r"values 3, labels 4"),
        ({"values": torch.tensor(1.0)}, 1, "0, of which 1 are held out"),
        ({"values": torch.zeros(3)}, 0, "3, of which 0 are held out"),
        ({"values": torch.zeros(3)}, 3, "3, of which 3 are held out"),
    ],
)
def test_arrays_that_are_no_examples(arrays: Any, held_out: int, message: str) -> None:
    with pytest.raises(InputError, match=f"training examples: .*{message}"):
        Examples(arrays, held_out)


def test_refusals(tmp_path: Path) -> None:
    model, data, run = model_of(Forecaster), data_of(Forecaster), tmp_path / "run"
    for wrong, message in (
        (Examples({"labels": torch.zeros(30, 2)}), "has the arrays labels; Forecaster reads 'values'"),
        (Examples({**data.arrays, "other": torch.zeros(30)}), "'other' is no argument of Forecaster.forward"),
        (Examples({"values": data.arrays["values"]}), "Forecaster: its forward returns no 'loss' for values"),
    ):
        with pytest.raises(InputError, match=message):
            gradual(model, wrong, run, **HOW)
    with pytest.raises(InputError, match="teacher: distils what a language model predicts"):
        gradual(model, data, tmp_path / "other", teacher=model, **HOW)
    for call in (lambda: distil(model, model, data, run), lambda: twist(model, data, run)):  # type: ignore[arg-type]
        with pytest.raises(InputError, match="training examples: gradual pruning alone takes them"):
            call()
