"""The training loop and distillation: exact restarts, any number of processes, what stops a run, what stays zero."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import sspruner
from sspruner.errors import InputError, ModelError
from sspruner.training import checkpoint
from sspruner.training.distil import distil, distillation, divergence, hidden_error, keep_zeros
from sspruner.training.loop import Settings, perplexity, train
from sspruner.training.run import run_folder
from support.examples import examples
from support.tiny import half, logits, tiny_model, tokens
from support.training import SMALL, Stopped, likelihood, metrics, same, text


def stop_after(step: int) -> Callable[[int], None]:
    def hook(now: int) -> None:
        if now == step:
            raise Stopped

    return hook


def noisy(model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A loss with random numbers in it, as dropout has."""
    loss, parts = likelihood(model, batch)
    return loss * (1 + torch.rand(())), parts


@pytest.mark.slow
@examples(8)
@example(stops=[4, 5], every=2, at_once=3)
@given(stops=st.lists(st.integers(1, 6), max_size=3), every=st.integers(1, 4), at_once=st.sampled_from([1, 3, 4]))
def test_an_interrupted_run_ends_bit_for_bit_like_one_that_was_not(
    stops: list[int], every: int, at_once: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Weights, perplexities and every line of the metrics; wherever it was stopped, and however often."""
    folder = tmp_path_factory.mktemp("run")
    asked = replace(SMALL, every=every, at_once=at_once)
    runs = []
    for name, when in (("whole", []), ("stopped", stops)):
        (folder / name).mkdir()
        for step in when:
            with suppress(Stopped):  # unless it was past that step before
                train(tiny_model(), text(folder), asked, noisy, folder / name, after_step=stop_after(step))
        model = tiny_model()
        runs.append((model, train(model, text(folder), asked, noisy, folder / name)))
    (whole, a), (stopped, b) = runs
    assert same(whole, stopped)
    assert (a.perplexity, a.steps, a.tokens) == (b.perplexity, b.steps, b.tokens)
    assert metrics(folder / "whole") == metrics(folder / "stopped")
    assert not same(whole, tiny_model())


@pytest.mark.slow
def test_a_run_learns_and_says_so(tmp_path: Path) -> None:
    model, asked = tiny_model(), replace(SMALL, max_tokens=60 * 32, every=50)
    found = train(model, text(tmp_path), asked, likelihood, tmp_path)
    assert found.perplexity[1] < 0.7 * found.perplexity[0]
    assert (found.steps, found.tokens, found.finished) == (60, 60 * 32, True)
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [0, *range(1, 51), 50, *range(51, 61), 60]
    assert lines[0]["held_out_perplexity"] == found.perplexity[0]
    assert (
        lines[-1]["held_out_perplexity"]
        == found.perplexity[1]
        == perplexity(model, text(tmp_path).held_out_blocks(), 4)
    )
    assert {"loss", "gradient_norm", "learning_rate", "tokens"} <= set(lines[5])


def test_how_many_at_once_is_a_matter_of_memory_alone(tmp_path: Path) -> None:
    """A batch in uneven pieces is the mean over its sequences: one step, without clipping, against autograd."""
    step = replace(SMALL, max_tokens=32, batch=4, clip=1e9, warm_up=0.0, weight_decay=0.0, every=9)
    gradients = []
    for at_once in (4, 3, 1):
        (tmp_path / str(at_once)).mkdir()
        model, seen = tiny_model(), []
        hook = lambda now, model=model, seen=seen: seen.extend(p.grad.clone() for p in model.parameters())  # noqa: E731
        train(
            model, text(tmp_path), replace(step, at_once=at_once), likelihood, tmp_path / str(at_once), after_step=hook
        )
        gradients.append(seen)
    for own in gradients[1:]:
        for a, b in zip(gradients[0], own, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_perplexity_is_of_blocks_alone() -> None:
    model, blocks = tiny_model(), tokens(5, 7)
    with torch.no_grad():
        found = model(blocks).logits[:, :-1].double()
    nll = nn.functional.cross_entropy(found.flatten(0, 1), blocks[:, 1:].flatten())
    assert perplexity(model, blocks, 2) == pytest.approx(math.exp(float(nll)), rel=1e-5)


@given(steps=st.integers(1, 500), warm_up=st.floats(0, 0.5), rate=st.floats(1e-6, 1))
def test_rates_rise_and_fall_to_a_tenth(steps: int, warm_up: float, rate: float) -> None:
    asked = Settings(max_tokens=steps * 32, batch=4, seq_len=8, learning_rate=rate, warm_up=warm_up)
    found = [asked.rate(step) for step in range(1, steps + 1)]
    top = found.index(max(found))
    assert asked.steps == steps
    assert max(found) == pytest.approx(rate)
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)
    assert found[-1] == pytest.approx(rate / 10) or top == len(found) - 1


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_with_the_last_good_checkpoint(tmp_path: Path) -> None:
    calls = []

    def bad(model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, parts = likelihood(model, batch)
        calls.append(0)
        return (loss * math.nan if len(calls) == 4 else loss), parts

    with pytest.raises(InputError, match=r"step 4: the loss is nan.*another folder, with a lower learning rate"):
        train(tiny_model(), text(tmp_path), SMALL, bad, tmp_path)
    model, whole = tiny_model(), tiny_model()
    assert train(model, text(tmp_path), SMALL, likelihood, tmp_path).steps == 6
    (tmp_path / "other").mkdir()
    train(whole, text(tmp_path), SMALL, likelihood, tmp_path / "other")
    assert same(model, whole)


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoints"
    with pytest.raises(Stopped):
        train(tiny_model(), text(tmp_path), SMALL, likelihood, tmp_path, after_step=stop_after(3))
    real = checkpoint.state_dict_saver.save

    def full(state: Any, checkpoint_id: Path, **options: Any) -> None:
        checkpoint_id.mkdir()
        (checkpoint_id / "__0_0.distcp").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.state_dict_saver, "save", full)
    with pytest.raises(InputError, match=r"step-00000004: cannot be written .*No space left.*step-00000002 is whole"):
        train(tiny_model(), text(tmp_path), SMALL, likelihood, tmp_path)
    monkeypatch.setattr(checkpoint.state_dict_saver, "save", real)
    model, whole = tiny_model(), tiny_model()
    train(model, text(tmp_path), SMALL, likelihood, tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000004", "step-00000006"]
    (tmp_path / "other").mkdir()
    train(whole, text(tmp_path), SMALL, likelihood, tmp_path / "other")
    assert same(model, whole)


def test_time_ends_a_run_with_what_it_has(tmp_path: Path) -> None:
    found = train(tiny_model(), text(tmp_path), replace(SMALL, max_minutes=1e-9), likelihood, tmp_path)
    assert (found.steps, found.finished) == (0, False)


@pytest.mark.slow
def test_a_run_that_time_has_ended_may_be_given_more(tmp_path: Path) -> None:
    teacher = tiny_model(seed=1)
    late, whole = (tiny_model(), tiny_model())
    _, found = distil(late, teacher, text(tmp_path), tmp_path / "run", settings=replace(SMALL, max_minutes=1e-9))
    assert not found.finished
    late, found = distil(tiny_model(), teacher, text(tmp_path), tmp_path / "run", settings=SMALL)
    whole, _ = distil(whole, teacher, text(tmp_path), tmp_path / "other", settings=SMALL)
    assert found.finished
    assert same(late, whole)
    with pytest.raises(InputError, match="another learning_rate"):
        distil(tiny_model(), teacher, text(tmp_path), tmp_path / "run", settings=replace(SMALL, learning_rate=1.0))


@given(alpha=st.floats(0, 1), temperature=st.floats(0.5, 4), hidden=st.sampled_from([0.0, 0.5]))
@examples(10)
def test_the_loss_of_distillation_by_hand(alpha: float, temperature: float, hidden: float) -> None:
    """Against fp64, term by term; a student that is the teacher has only the text to learn from."""
    teacher, student, batch = tiny_model(seed=1), tiny_model(seed=2), tokens(3, 6)
    loss, _ = distillation(teacher, alpha, temperature, hidden)(student, batch)
    own, theirs = (model(batch, output_hidden_states=True) for model in (student, teacher))
    q, p = ((out.logits[:, :-1].double() / temperature).log_softmax(-1) for out in (own, theirs))
    kl = (p.exp() * (p - q)).sum(-1).mean()
    ce = nn.functional.cross_entropy(own.logits[:, :-1].double().flatten(0, 1), batch[:, 1:].flatten())
    wanted = (1 - alpha) * ce + alpha * temperature**2 * kl
    if hidden:
        errors = [
            (a - b).pow(2).sum() / b.pow(2).sum() for a, b in zip(own.hidden_states, theirs.hidden_states, strict=True)
        ]
        wanted = wanted + hidden * sum(errors[1:]) / (len(errors) - 1)
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-4)
    assert float(distillation(teacher, 1.0, temperature, hidden)(teacher, batch)[0].detach()) == pytest.approx(
        0, abs=1e-5
    )
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None and bool(p.grad.any()) for p in student.parameters())


def test_divergence_and_hidden_error_are_zero_only_for_equals() -> None:
    a, b = torch.randn(2, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    assert float(divergence(a, a)) == 0 < float(divergence(a, b))
    assert float(hidden_error((a, a), (b, a))) == 0 < float(hidden_error((a, b), (a, a)))


@pytest.mark.slow
def test_a_cut_student_recovers_and_zeros_stay(tmp_path: Path) -> None:
    """Of a mask of single elements, too; weights come back in the dtype that they had."""
    teacher, student = tiny_model(seed=1), tiny_model(seed=1, dtype=torch.bfloat16)
    sspruner.apply(student, half(sspruner.trace(student)))
    weight = student.backbone.layers[0].mixer.in_proj.weight
    weight.data[:, ::2] = 0
    seen = text(tmp_path).held_out_blocks()
    before = float(divergence(logits(teacher, seen), logits(student, seen)))
    asked = replace(SMALL, max_tokens=60 * 32, every=60)
    found, trained = distil(student, teacher, text(tmp_path), tmp_path / "run", settings=asked, alpha=1.0)
    assert found is student
    assert trained.steps == 60
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in found.parameters())
    assert not bool(weight[:, ::2].any())
    assert bool(weight[:, 1::2].all())
    assert float(divergence(logits(teacher, seen), logits(found, seen))) < 0.7 * before


@pytest.mark.slow
def test_narrow_matrices_are_trained_and_merged(tmp_path: Path) -> None:
    """Nothing but them changes until the end; then the model is of its own class again, and is another."""
    pytest.importorskip("peft")
    teacher, student = tiny_model(seed=1), tiny_model(seed=1)
    sspruner.apply(student, half(sspruner.trace(student)))
    for layer in student.backbone.layers:
        layer.mixer.in_proj.weight.data.mul_(0.3)
    seen = text(tmp_path).held_out_blocks()
    before, names = (
        float(divergence(logits(teacher, seen), logits(student, seen))),
        [n for n, _ in student.named_parameters()],
    )
    norm = student.backbone.norm_f.weight.clone()
    asked = replace(SMALL, max_tokens=60 * 32, every=60)
    found, _ = distil(student, teacher, text(tmp_path), tmp_path / "run", settings=asked, alpha=1.0, lora=2)
    assert type(found) is type(student)
    assert [n for n, _ in found.named_parameters()] == names
    assert torch.equal(found.backbone.norm_f.weight, norm)
    assert float(divergence(logits(teacher, seen), logits(found, seen))) < 0.9 * before
    sspruner.save(found, tmp_path / "saved")
    assert torch.equal(logits(sspruner.load(tmp_path / "saved")[0], seen), logits(found, seen))


def test_narrow_matrices_would_fill_zeros(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    student = tiny_model()
    student.backbone.layers[0].mixer.in_proj.weight.data[0] = 0
    with pytest.raises(InputError, match=r"in_proj.weight holds zeros, which narrow matrices would fill"):
        distil(student, tiny_model(), text(tmp_path), tmp_path / "run", settings=SMALL, lora=2)
    other = tiny_model()  # where no narrow matrix is added, zeros are in nobody's way
    other.backbone.embeddings.weight.data[0] = 0
    other.backbone.layers[0].mixer.out_proj.weight.data[0] = 0
    found, _ = distil(other, tiny_model(), text(tmp_path), tmp_path / "other", settings=SMALL, lora=2)
    assert not found.backbone.embeddings.weight[0].any()
    assert not found.backbone.layers[0].mixer.out_proj.weight[0].any()


def test_recomputed_activations_change_nothing(tmp_path: Path) -> None:
    runs = []
    for name, recompute in (("a", False), ("b", True)):
        (tmp_path / name).mkdir()
        model = tiny_model()
        train(model, text(tmp_path), replace(SMALL, recompute=recompute), likelihood, tmp_path / name)
        runs.append(model)
    assert same(*runs)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in runs[1].modules())


@pytest.mark.slow
def test_bf16_keeps_weights_in_fp32_and_learns(tmp_path: Path) -> None:
    model, seen = tiny_model(), []

    def spied(trained: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        seen.append(trained.backbone.layers[0].mixer.in_proj(torch.zeros(1, 4)).dtype)
        return likelihood(trained, batch)

    found = train(model, text(tmp_path), replace(SMALL, bf16=True, max_tokens=40 * 32, every=40), spied, tmp_path)
    assert {*seen} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert found.perplexity[1] < 0.8 * found.perplexity[0]


def test_zeros_of_vectors_are_trained() -> None:
    model = tiny_model()
    model.backbone.layers[0].mixer.conv1d.bias.data.zero_()
    model.backbone.layers[0].mixer.in_proj.weight.data[0] = 0
    hook = keep_zeros(model)
    for parameter in model.parameters():
        parameter.data += 1
    hook(1)
    assert bool((model.backbone.layers[0].mixer.conv1d.bias == 1).all())
    assert not bool(model.backbone.layers[0].mixer.in_proj.weight[0].any())
    assert bool((model.backbone.layers[0].mixer.in_proj.weight[1:] != 0).any())


def test_another_run_does_not_go_on_in_the_same_folder(tmp_path: Path) -> None:
    run_folder(tmp_path / "run", {"alpha": 0.5, "seed": 0})
    run_folder(tmp_path / "run", {"alpha": 0.5, "seed": 0})
    with pytest.raises(InputError, match=r"another alpha \(0.5, now 0.6\)"):
        run_folder(tmp_path / "run", {"alpha": 0.6, "seed": 0})
    (tmp_path / "run/run.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="is damaged"):
        run_folder(tmp_path / "run", {"alpha": 0.5})
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("x", encoding="utf-8")
    with pytest.raises(InputError, match="holds other files"):
        run_folder(tmp_path / "full", {})


def test_a_run_keeps_its_recipe_and_one_of_the_version_before_goes_on(tmp_path: Path) -> None:
    """run.json had no recipe, and the folder no recipe.yaml."""
    folder = tmp_path / "run"
    model, found = distil(tiny_model(), tiny_model(seed=1), text(tmp_path), folder, settings=SMALL, alpha=0.75)
    recipe = sspruner.DistilRecipe.load(folder / "recipe.yaml")
    assert (recipe.method.alpha, recipe.settings) == (0.75, SMALL)
    assert (recipe.text.text, recipe.text.held_out) == (text(tmp_path).sources, text(tmp_path).held_out)
    asked = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert asked.pop("recipe") == recipe.to_json()
    assert (asked["method"], asked["alpha"], asked["every"]) == ("distil", 0.75, SMALL.every)
    (folder / "run.json").write_text(json.dumps(asked), encoding="utf-8")
    (folder / "recipe.yaml").unlink()
    longer = replace(recipe, settings=replace(SMALL, max_minutes=9.0))
    again, more = distil(tiny_model(), tiny_model(seed=1), text(tmp_path), folder, longer)
    assert (more.steps, same(again, model)) == (found.steps, True)
    assert sspruner.DistilRecipe.load(folder / "recipe.yaml") == longer
    other = replace(recipe, method=replace(recipe.method, temperature=3.0))
    with pytest.raises(InputError, match=r"another temperature \(1.0, now 3.0\)"):
        distil(tiny_model(), tiny_model(seed=1), text(tmp_path), folder, other)
    with pytest.raises(InputError, match="alpha: a recipe says this"):
        distil(tiny_model(), tiny_model(seed=1), text(tmp_path), folder, recipe, alpha=0.5)


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    for wrong in ({"alpha": 2.0}, {"temperature": 0.0}, {"hidden": -1.0}, {"lora": -1}):
        with pytest.raises(InputError, match="alpha"):
            distil(model, model, text(tmp_path), tmp_path / "run", **wrong)
    for held_out in (0, -1):
        with pytest.raises(InputError, match=f"held_out {held_out}: must be at least 1"):
            distil(model, model, replace(text(tmp_path), held_out=held_out), tmp_path / "run")
    other = tiny_model()
    other.resize_token_embeddings(7)
    with pytest.raises(ModelError, match="7 tokens in its vocabulary and the student 31"):
        distil(model, other, text(tmp_path), tmp_path / "run")
    with pytest.raises(ModelError, match="hidden: the student has 2 blocks of size 4, the teacher 1 of 4"):
        distil(model, tiny_model(layers=1), text(tmp_path), tmp_path / "run", hidden=0.5)
    with pytest.raises(ModelError, match="hidden: the student has 2 blocks of size 4, the teacher 2 of 8"):
        distil(model, tiny_model(heads_per_group=4), text(tmp_path), tmp_path / "run", hidden=0.5)
    assert not (tmp_path / "run").exists()
