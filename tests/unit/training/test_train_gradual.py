"""Gradual pruning: the schedule, one threshold, masks that only grow, cuts that are proved, exact restarts."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner.budgets.elements import FLOOR
from sspruner.errors import InputError, ModelError
from sspruner.training import gradual as module
from sspruner.training.gradual import Pruner, Schedule, decay_ranges, gradual
from support.examples import examples
from support.tiny import logits, tiny_model, tokens
from support.training import SMALL, Stopped, metrics, same, text
from support.zoo import zoo

TEN = replace(SMALL, max_tokens=10 * 32, every=3)
STEPS = {"every": 2, "begin": 0.1, "end": 0.7}


@given(sparsity=st.floats(0.01, 0.99), begin=st.integers(0, 50), length=st.integers(1, 200), every=st.integers(1, 20))
def test_the_schedule_rises_to_its_end_and_stays(sparsity: float, begin: int, length: int, every: int) -> None:
    """The cubic of the paper, against its formula; new masks after the beginning and at the end, whatever `every`."""
    asked = Schedule(sparsity, begin, begin + length, every)
    found = [asked.at(step) for step in range(begin + length + 20)]
    assert found == sorted(found)
    assert found[: begin + 1] == [0] * (begin + 1)
    assert found[begin + length :] == pytest.approx([sparsity] * 20)
    for step in range(begin, begin + length + 1):
        assert found[step] == pytest.approx(sparsity + (0 - sparsity) * (1 - (step - begin) / length) ** 3)
    due = [step for step in range(begin + length + 20) if asked.due(step)]
    assert due[-1] == begin + length
    assert due[0] > begin
    assert all(step % every == 0 for step in due[:-1])


@pytest.mark.parametrize("wrong", [(0.5, 5, 5, 1), (0.5, 0, 5, 0), (0.5, -1, 5, 1)])
def test_a_schedule_that_makes_no_sense_is_refused(wrong: tuple[float, int, int, int]) -> None:
    with pytest.raises(InputError, match="schedule"):
        Schedule(*wrong)


def pruner(model: Any, axis: str, alpha: float = 1.0, sparsity: float = 0.5, allocation: str = "uniform") -> Pruner:
    return Pruner(model, axis, Schedule(sparsity, 0, 4, 1), alpha, allocation, tokens(2, 8))


@given(alpha=st.sampled_from([0.0, 0.5, 1.0, 2.0]), sparsity=st.floats(0.1, 0.9), seed=st.integers(0, 3))
@examples(15)
def test_one_threshold_is_the_exact_one(alpha: float, sparsity: float, seed: int) -> None:
    """Against a sort of all scores; but for what every tensor keeps of its best."""
    model = tiny_model(seed=seed)
    own = pruner(model, "weight", alpha)
    generator = torch.Generator().manual_seed(seed)
    for name in own.trained:
        own.memory[f"slope.{name}"].copy_(torch.rand(own.trained[name].shape, generator=generator))
    found = own.plan(sparsity)
    scores = {
        name: own.parameters[group.tensor].detach().abs() * own.memory[f"slope.{group.tensor}"] ** alpha
        for name, group in own.groups.items()
    }
    every = torch.cat([s.flatten() for s in scores.values()])
    kept = {name: own.kept(found, name) for name in scores}
    assert sum(int(k.sum()) for k in kept.values()) == round(len(every) * (1 - sparsity))
    weakest = min(float(scores[n][k].min()) for n, k in kept.items() if k.sum() > round(FLOOR * k.numel()))
    for name, stays in kept.items():
        assert int(stays.sum()) >= round(FLOOR * stays.numel())
        if not stays.all():
            assert float(scores[name][~stays].max()) <= weakest
            assert float(scores[name][~stays].max()) <= float(scores[name][stays].min())


def test_gradients_are_summed_up_between_masks() -> None:
    """Absolute values, of every step since the last mask; then anew."""
    own = Pruner(tiny_model(), "weight", Schedule(0.5, 0, 4, 2), 1.0, "uniform", tokens(2, 8))
    name, parameter = next(iter(own.trained.items()))
    sums = []
    for step in range(1, 5):
        for other in own.trained.values():
            other.grad = torch.full_like(other, -1.0 if step % 2 else 3.0)
        own(step)
        sums.append(float(own.memory[f"slope.{name}"].mean()))
    assert sums == [1.0, 0.0, 1.0, 0.0]
    assert parameter.shape == own.memory[f"slope.{name}"].shape


def watched(patch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """Every mask that a run has after a step."""
    seen: list[dict[str, torch.Tensor]] = []
    real = Pruner.__call__

    def call(self: Pruner, step: int) -> None:
        real(self, step)
        seen.append({name: value.clone() for name, value in self.memory.items() if name.startswith("kept.")})

    patch.setattr(Pruner, "__call__", call)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_elements_go_as_scheduled_and_never_come_back(alpha: float, tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.MonkeyPatch.context() as patch:
        seen = watched(patch)
        model, made, found = gradual(
            model, text(tmp_path), tmp_path / "run", sparsity=0.6, alpha=alpha, settings=TEN, **STEPS
        )
    asked = Schedule(0.6, 1, 7, 2)
    total = sum(keep.numel() for keep in seen[0].values())
    for step, (before, now) in enumerate(zip([seen[0], *seen], seen, strict=False), 1):
        assert all(not bool((now[name] & ~before[name]).any()) for name in now)
        last = max((s for s in range(step + 1) if asked.due(s)), default=0)
        assert sum(int(keep.sum()) for keep in now.values()) == round(total * (1 - asked.at(last))), step
    assert found.steps == 10
    assert set(made.axes) == {"weight"}
    zeros = {n: model.get_parameter(n.removesuffix(":weight") + ".weight") == 0 for n in made.elements}
    assert all(torch.equal(zeros[name], ~keep) for name, keep in made.elements.items())
    assert metrics(tmp_path / "run")[-1]["held_out_perplexity"] == found.perplexity[1]


@pytest.mark.slow
@pytest.mark.cover(most=1)
@pytest.mark.parametrize(
    ("family", "axis", "allocation"),
    [
        ("mamba2", "state", "uniform"),
        ("mamba2", "head", "uniform"),
        ("mamba2", "state", "global"),
        ("mamba", "channel", "uniform"),
        ("zamba2", "attn_head", "uniform"),
    ],
)
def test_units_end_in_a_slice_that_is_proved(family: str, axis: str, allocation: str, tmp_path: Path) -> None:
    """What the masked model said in training, the smaller one says; every layer of `uniform` gives the same."""
    model, said = zoo(family), []
    before = sspruner.trace(model).parameters
    source = text(tmp_path)
    seen = tokens(3, 8) % model.config.vocab_size
    real = module.apply

    def apply(trained: Any, plan: Any) -> Any:
        said.append(logits(trained, seen))
        return real(trained, plan)

    with pytest.MonkeyPatch.context() as patch:
        masks = watched(patch)
        patch.setattr(module, "apply", apply)
        model, made, _ = gradual(
            model, source, tmp_path / "run", axis=axis, allocation=allocation, settings=TEN, **STEPS
        )
    torch.testing.assert_close(logits(model, seen), said[0], rtol=1e-3, atol=1e-4)
    assert sspruner.trace(model).parameters < before
    assert all(not bool((now[n] & ~old[n]).any()) for old, now in pairwise(masks) for n in now)
    if allocation == "uniform":
        assert all(cut.after == round(cut.before / 2) for cut in made.groups.values())
    sspruner.save(model, tmp_path / "saved")
    torch.testing.assert_close(logits(sspruner.load(tmp_path / "saved")[0], seen), logits(model, seen))


@pytest.mark.exhaustive
@pytest.mark.slow
@examples(6)
@given(stop=st.integers(1, 10), axis=st.sampled_from(["weight", "state"]))
def test_an_interrupted_run_ends_with_the_same_masks_and_weights(
    stop: int, axis: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Gradients that were summed up since the last mask are part of a checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    arguments: dict[str, Any] = {"axis": axis, "settings": replace(TEN, every=1), **STEPS, "every": 3}
    real = Pruner.__call__

    def call(self: Pruner, step: int) -> None:
        real(self, step)
        if step == stop:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch, suppress(Stopped):
        patch.setattr(Pruner, "__call__", call)
        gradual(tiny_model(), text(folder), folder / "stopped", **arguments)
    a, plan_a, _ = gradual(tiny_model(), text(folder), folder / "stopped", **arguments)
    b, plan_b, _ = gradual(tiny_model(), text(folder), folder / "whole", **arguments)
    assert plan_a == plan_b
    assert same(a, b)


def test_decay_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for family in ("mamba2", "mamba", "qwen3_next", "kimi_linear"):
        model = zoo(family)
        found = decay_ranges(model, tokens(2, 8) % model.config.vocab_size)
        assert list(found) == [site.path for site in sspruner.trace(model).layers]
        assert all(0 < low <= high < 1 for low, high in found.values())
    forgetting = zoo("qwen3_next")
    forgetting.model.layers[0].linear_attn.A_log.data.fill_(20)
    assert decay_ranges(forgetting, tokens(2, 8))["model.layers.0.linear_attn"] == (0.0, 0.0)
    still = tiny_model()
    still.backbone.layers[1].mixer.A_log.data.fill_(-1e4)
    assert decay_ranges(still, tokens(2, 8))["backbone.layers.1.mixer"] == (1.0, 1.0)
    with pytest.raises(InputError, match=r"step 2: the decay of backbone.layers.1.mixer is from 1 to 1, outside"):
        gradual(still, text(tmp_path), tmp_path / "run", settings=TEN, **STEPS)


@pytest.mark.parametrize("axis", ["state", "weight"])
def test_a_delta_rule_is_pruned_while_it_trains(axis: str, tmp_path: Path) -> None:
    model = zoo("qwen3_next")
    before = sspruner.trace(model).state_bytes
    model, made, found = gradual(
        model, text(tmp_path), tmp_path / "run", axis=axis, sparsity=0.5, settings=TEN, **STEPS
    )
    assert found.finished
    assert made.axes == (axis,)
    assert sspruner.trace(model).state_bytes == before // (2 if axis == "state" else 1)


def test_a_trained_model_is_trained_again_and_a_teacher_answers_in_eval_mode(tmp_path: Path) -> None:
    """A model comes back without gradients, and a teacher may be handed over in train mode."""
    first, *_ = gradual(tiny_model(), text(tmp_path), tmp_path / "a", axis="state", settings=TEN, **STEPS)
    teacher, modes = tiny_model(seed=1).train(), set[bool]()
    teacher.register_forward_hook(lambda module, *_: modes.add(module.training))
    second, _, found = gradual(
        first, text(tmp_path), tmp_path / "b", axis="head", sparsity=0.5, settings=TEN, teacher=teacher, **STEPS
    )
    assert found.finished
    assert modes == {False}
    assert not any(p.requires_grad for p in second.parameters())
    other = tiny_model()
    other.resize_token_embeddings(7)
    with pytest.raises(ModelError, match="teacher: has 7 tokens in its vocabulary"):
        gradual(tiny_model(), text(tmp_path), tmp_path / "c", settings=TEN, teacher=other, **STEPS)


def test_a_run_that_ends_before_anything_went_leaves_the_model_whole(tmp_path: Path) -> None:
    late = replace(TEN, max_minutes=1e-9)
    model, made, found = gradual(tiny_model(), text(tmp_path), tmp_path / "run", axis="state", settings=late, **STEPS)
    assert (found.steps, made.drops) == (0, False)
    assert same(model, tiny_model())


def test_what_cannot_go_is_refused_before_training(tmp_path: Path) -> None:
    model = tiny_model(heads_per_group=2)
    for wrong in ({"axis": "head", "sparsity": 0.9}, {"axis": "nosuch"}, {"alpha": -1.0}, {"sparsity": 1.5}):
        with pytest.raises(InputError):
            gradual(model, text(tmp_path), tmp_path / "run", settings=TEN, **wrong)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_recipe_of_a_run_and_its_teacher(tmp_path: Path) -> None:
    how = {"axis": "state", "sparsity": 0.5, "every": 2, "begin": 0.1, "end": 0.7, "settings": TEN}
    gradual(tiny_model(), text(tmp_path), tmp_path / "run", teacher=tiny_model(seed=1), **how)
    recipe = sspruner.GradualRecipe.load(tmp_path / "run/recipe.yaml")
    assert (recipe.method.axis, recipe.method.mask_every, recipe.settings) == ("state", 2, TEN)
    named = replace(recipe, method=replace(recipe.method, teacher="big"))
    with pytest.raises(InputError, match="teacher big: load it"):
        gradual(tiny_model(), text(tmp_path), tmp_path / "other", named)


def test_decay_is_looked_at_where_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on a GPU that the user did not name."""
    asked = []
    real = module.score
    monkeypatch.setattr(module, "score", lambda *a, **how: asked.append(how["device"]) or real(*a, **how))
    decay_ranges(tiny_model(), tokens(2, 8))
    assert asked == ["cpu"]
