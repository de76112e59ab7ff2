"""`sspruner.accelerate`: the stock step's numbers, in every family that has it, and nothing else changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner.compute.acceleration import accelerated
from sspruner.compute.forward import cache_in, forward
from sspruner.errors import ModelError
from sspruner.runtime import decode_step
from sspruner.testing.plans import directions
from support.tiny import half, logits, models, plans, tiny_model, tokens
from support.zoo import FAMILIES, rounding, zoo

TYPE2 = ("mamba2", "zamba2", "bamba", "granitemoehybrid", "falcon_h1", "nemotron_h")
each_family = pytest.mark.parametrize("family", TYPE2)


@torch.no_grad()
def decoded(model: Any, ids: torch.Tensor, prefill: int = 7, order: list[int] | None = None) -> torch.Tensor:
    """Logits of the steps after a prefill; `order` permutes the sequences of the cache before the first step."""
    cache: dict[str, Any] = {}
    steps = []
    for positions in torch.split(torch.arange(ids.shape[1]), [prefill] + [1] * (ids.shape[1] - prefill)):
        out = forward(model, ids[:, positions], use_cache=True, position_ids=positions[None], **cache)
        cache = cache_in(out)
        steps.append(out.logits.float())
        if order and len(steps) == 1:
            for held in cache.values():
                held.reorder_cache(torch.tensor(order))
    return torch.cat(steps[1:], 1)


class Spy:
    """Counts the steps that the faster code did, for a fallback would pass every comparison."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls, real = 0, decode_step.update_state

        def counted(*args: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return real(*args)

        patch.setattr(decode_step, "update_state", counted)


def same_steps(model: Any, ids: torch.Tensor, tolerance: float, **how: Any) -> None:
    """Accelerated = stock after several steps, through the faster code in every mixer, and stock again after it."""
    expected, layers = decoded(model, ids, **how), len(sspruner.trace(model).layers)
    with pytest.MonkeyPatch.context() as patch:
        spy = Spy(patch)
        found = decoded(sspruner.accelerate(model), ids, **how)
        assert spy.calls == layers * found.shape[1]
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()
        again = decoded(sspruner.decelerate(model), ids, **how)
        assert spy.calls == layers * found.shape[1]
    assert torch.equal(again, expected)


@pytest.mark.slow
@given(models(), st.integers(1, 3), st.data())
def test_the_same_steps(model: Any, batch: int, data: st.DataObject) -> None:
    """Any widths, groups, kernels, biases; cut to other sizes in each layer, or projected."""
    ids = tokens(batch, 12, data.draw(st.integers(0, 99)))
    graph = sspruner.trace(model)
    kind = data.draw(st.sampled_from(["dense", "cut", "projected"]))
    states = {name: group for name, group in graph.on_axis("state").items() if group.units > 1}
    if kind != "dense" and states:
        plan = data.draw(plans(graph, ("state",)))
        sspruner.apply(model, plan if kind == "cut" else directions(plan, graph, 0))
    bf16 = model.dtype == torch.bfloat16
    same_steps(model, ids, 0.1 if bf16 else max(1e-5, 32 * rounding(model, ids)))


@pytest.mark.slow
@pytest.mark.cover
@each_family
@pytest.mark.parametrize("kind", ["dense", "projected"])
def test_every_family(family: str, kind: str) -> None:
    model, ids = zoo(family), tokens(3, 14)
    if kind == "projected":
        graph = sspruner.trace(model)
        sspruner.apply(model, directions(half(graph), graph, 1))
    same_steps(model, ids, max(1e-5, 32 * rounding(model, ids)))


@pytest.mark.slow
@each_family
def test_a_cache_that_was_reordered(family: str) -> None:
    model, ids = zoo(family), tokens(3, 12)
    same_steps(model, ids, max(1e-5, 32 * rounding(model, ids)), order=[2, 2, 0])


def test_falcon_h1_without_a_norm() -> None:
    model, ids = zoo("falcon_h1", mamba_rms_norm=False), tokens(2, 12)
    same_steps(model, ids, max(1e-5, 32 * rounding(model, ids)))


@given(
    st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), st.integers(1, 400)
)
def test_the_update_is_the_recurrence(b: int, groups: int, per: int, P: int, N: int, at_once: int) -> None:
    """In fp64 to the last digits, whatever part of the batch is updated at once; the state moves in place."""
    H, rng = groups * per, torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(shape, generator=rng, dtype=torch.float64)  # noqa: E731
    state, x, dt, A, B, C, D = make(b, H, P, N), make(b, H, P), make(b, H).exp(), -make(H).exp(), *(
        make(b, groups, N) for _ in range(2)
    ), make(H)  # fmt: skip
    expected, y = state.clone(), torch.zeros(b, H, P, dtype=torch.float64)
    for i in range(b):
        for h in range(H):
            expected[i, h] = torch.exp(dt[i, h] * A[h]) * state[i, h] + dt[i, h] * torch.outer(x[i, h], B[i, h // per])
            y[i, h] = expected[i, h] @ C[i, h // per] + D[h] * x[i, h]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_step, "SLICE", at_once * 8)
        found = decode_step.update_state(state, x, dt, A, B, C, D)
    torch.testing.assert_close(found, y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_bf16_is_no_further_from_fp64_than_stock() -> None:
    """Over many models: roundings are fewer, for the update is taken in fp32."""
    far: dict[str, list[float]] = {"stock": [], "accelerated": []}
    for seed in range(12):
        model, ids = tiny_model(groups=2, state=8, head_dim=8, seed=seed, dtype=torch.bfloat16), tokens(2, 16, seed)
        exact = logits(copy.deepcopy(model).double(), ids)[:, 7:]
        far["stock"].append(float((decoded(model, ids) - exact).norm() / exact.norm()))
        far["accelerated"].append(float((decoded(sspruner.accelerate(model), ids) - exact).norm() / exact.norm()))
    assert sum(far["accelerated"]) <= 1.1 * sum(far["stock"])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mamba2", "zamba2", "falcon_h1"])
def test_padded_prompts_generate_the_same_text(family: str) -> None:
    model, ids = zoo(family), tokens(3, 9).clamp_min(1)
    ids[0, :4] = 0
    mask = ids != 0
    asked = {"attention_mask": mask.long(), "max_new_tokens": 8, "do_sample": False, "num_beams": 2}
    expected = model.generate(ids, **asked)
    with pytest.MonkeyPatch.context() as patch:
        spy = Spy(patch)
        assert torch.equal(sspruner.accelerate(model).generate(ids, **asked), expected)
        assert spy.calls > 0


def test_undo_brings_the_forward_of_before() -> None:
    """That of the class; or that of a projection; twice accelerated is once, and undone twice is undone."""
    model = tiny_model()
    mixers = [layer.mixer for layer in model.backbone.layers]
    before = [dict(vars(mixer)) for mixer in mixers]
    sspruner.accelerate(sspruner.accelerate(model))
    assert accelerated(model)
    sspruner.decelerate(sspruner.decelerate(model))
    assert [dict(vars(mixer)) for mixer in mixers] == before
    assert not accelerated(model)

    graph = sspruner.trace(model)
    sspruner.apply(model, directions(half(graph), graph, 0))
    own = [vars(mixer)["forward"] for mixer in mixers]
    sspruner.decelerate(sspruner.accelerate(model))
    assert [vars(mixer)["forward"] for mixer in mixers] == own


def test_everything_but_a_step_runs_the_code_of_before() -> None:
    """Prefill, no cache, gradients."""
    model, ids = tiny_model(), tokens(2, 9)
    plain, (loss,) = logits(model, ids), torch.autograd.grad(
        forward(model, ids, use_cache=False).logits.sum(), [model.backbone.layers[0].mixer.A_log]
    )  # fmt: skip
    sspruner.accelerate(model)
    with pytest.MonkeyPatch.context() as patch:
        spy = Spy(patch)
        assert torch.equal(logits(model, ids), plain)
        grown = torch.autograd.grad(
            forward(model, ids, use_cache=False).logits.sum(), [model.backbone.layers[0].mixer.A_log]
        )
        assert torch.equal(grown[0], loss)
        assert spy.calls == 0


def test_a_step_with_gradients_runs_the_code_of_before() -> None:
    """The faster step writes into the state that gradients would need."""
    model, ids = tiny_model(), tokens(2, 9)
    sspruner.accelerate(model)
    with torch.no_grad():
        cache = cache_in(forward(model, ids, use_cache=True))
    with pytest.MonkeyPatch.context() as patch:
        spy = Spy(patch)
        forward(model, ids[:, :1], use_cache=True, **cache)
        assert spy.calls == 0
        with torch.no_grad():
            forward(model, ids[:, :1], use_cache=True, **cache)
        assert spy.calls == 2


def test_save_prune_and_copy_do_not_see_it(tmp_path: Path) -> None:
    plain, model = tiny_model(), sspruner.accelerate(tiny_model())
    for name, one in (("plain", plain), ("accelerated", model)):
        sspruner.save(one, tmp_path / name)
    for file in (tmp_path / "plain").rglob("*"):
        if file.is_file():
            assert (tmp_path / "accelerated" / file.relative_to(tmp_path / "plain")).read_bytes() == file.read_bytes()
    twin, ids = copy.deepcopy(model), tokens(2, 12)
    with torch.no_grad():
        model.backbone.layers[0].mixer.D.add_(1.0)
    assert torch.equal(decoded(twin, ids), decoded(sspruner.accelerate(tiny_model()), ids))
    sspruner.apply(twin, half(sspruner.trace(twin)))
    sspruner.apply(plain, half(sspruner.trace(plain)))
    same_steps(plain, ids, 1e-5)
    assert (decoded(twin, ids) - decoded(plain, ids)).abs().max() <= 1e-5 * decoded(plain, ids).abs().max()


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in TYPE2])
def test_models_without_such_mixers_are_refused(family: str) -> None:
    with pytest.raises(ModelError, match="no Mamba2-type mixer"):
        sspruner.accelerate(zoo(family))


@pytest.mark.parametrize("before", [False, True])
def test_sampling_text_takes_the_faster_step_and_leaves_the_model_as_it_was(
    before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(layers=2)
    if before:
        sspruner.accelerate(model)
    spy = Spy(monkeypatch)
    sspruner.calibration("self", model, samples=2, seq_len=6, held_out=1)
    assert spy.calls == 2 * 4  # layers, tokens after the first step, which fills the cache
    assert accelerated(model) == before
    monkeypatch.setattr(decode_step, "update_state", None)  # what is called then is no function
    with pytest.raises(TypeError):
        sspruner.calibration("self", model, samples=2, seq_len=6, held_out=1)
    assert accelerated(model) == before
