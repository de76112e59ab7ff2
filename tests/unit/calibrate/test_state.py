"""Exact state statistics against the step-by-step fp64 recurrence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner.calibrate import state
from sspruner.calibrate.replay import Replay
from sspruner.calibrate.view import Observation, SSMView
from sspruner.graph.family import Projected
from sspruner.graph.site import within
from support.mamba2_state import TOLERANCE, close, projections
from support.oracle import ghost_sum, gramian, output, state_energy
from support.tiny import models, tiny_model, tokens
from support.zoo import FAMILIES, zoo


@given(projections(), st.sampled_from([1, 7, 64]))
def test_statistics_equal_the_recurrence_in_fp32(drawn: tuple[Projected, torch.Tensor], chunk: int) -> None:
    p, mask = drawn
    close(state.state_energy(p, chunk), state_energy(p))
    close(state.ghost_sum(p, mask, chunk), ghost_sum(p, mask))
    close(state.gramian(p, mask, chunk), gramian(p, mask))
    close(state.scan_output(p, chunk), output(p))


@given(projections(torch.float64), st.sampled_from([1, 7, 64]))
def test_the_algorithm_itself_is_exact(drawn: tuple[Projected, torch.Tensor], chunk: int) -> None:
    """In fp64 only rounding is left: a wrong term of any size would show."""
    p, mask = drawn
    close(state.state_energy(p, chunk), state_energy(p), 1e-10)
    close(state.ghost_sum(p, mask, chunk), ghost_sum(p, mask), 1e-10)
    close(state.gramian(p, mask, chunk), gramian(p, mask), 1e-10)
    close(state.scan_output(p, chunk), output(p), 1e-10)


@given(projections())
def test_energy_sum_is_the_diagonal_of_the_gramian(drawn: tuple[Projected, torch.Tensor]) -> None:
    p, mask = drawn
    diagonal = state.gramian(p, mask).diagonal(dim1=-2, dim2=-1)
    close(state.energy_sum(p, mask), diagonal)


@given(projections())
def test_gramian_is_symmetric_and_positive_semidefinite(drawn: tuple[Projected, torch.Tensor]) -> None:
    W = state.gramian(*drawn)
    assert torch.equal(W, W.transpose(-1, -2))
    assert (torch.linalg.eigvalsh(W) >= -1e-5 * (W.abs().amax() + 1e-30)).all()


@given(projections())
def test_padding_does_not_enter_a_sum(drawn: tuple[Projected, torch.Tensor]) -> None:
    """A right-padded batch gives the sums of its unpadded rows."""
    p, _ = drawn
    b, T = p.x.shape[:2]
    lengths = [max(1, T - 3 * row) for row in range(b)]
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    rows = [
        Projected(p.x[i : i + 1, :n], p.z[i : i + 1, :n], p.dt[i : i + 1, :n], p.A, p.B[i : i + 1, :n],
                  p.C[i : i + 1, :n], p.D)
        for i, n in enumerate(lengths)
    ]  # fmt: skip
    for statistic in (state.ghost_sum, state.energy_sum, state.gramian):
        close(statistic(p, mask), sum(statistic(row) for row in rows).double())


def test_slowest_and_fastest_decay_stay_finite() -> None:
    """dt*A of -1e5 beside -1e-9: nothing overflows, nothing is NaN, and the sums are still right."""
    T = 130
    dt = torch.full((1, T, 1), 1e-9)
    dt[0, ::17] = 1e5
    p = Projected(
        x=torch.randn(1, T, 1, 3), z=torch.zeros(1, T, 3), dt=dt, A=torch.tensor([-1.0]),
        B=torch.randn(1, T, 1, 2), C=torch.randn(1, T, 1, 2), D=torch.ones(1),
    )  # fmt: skip
    everything = torch.ones(1, T, dtype=torch.bool)
    close(state.ghost_sum(p), ghost_sum(p, everything))
    close(state.gramian(p), gramian(p, everything))


def views(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None) -> list[SSMView]:
    """One view per layer, each on the dense model's own hidden states."""
    graph = sspruner.trace(model)
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    replay = Replay(model, graph, [(ids, mask)], "cpu")
    layers = {layer.path: layer for layer in graph.layers}
    seen: list[SSMView] = []

    def show(path: str, hidden: torch.Tensor, m: torch.Tensor, inputs: Any) -> None:
        group = graph.groups[f"{path}:state"]
        seen.append(SSMView(Observation(model, path, m, family=layers[path].family, hidden=hidden), group))

    for block in replay.blocks:
        replay.observe(block, [path for path in layers if within(path, block)], show)
        replay.advance(block)
    return seen


def check_views(model: torch.nn.Module) -> None:
    """Gate and norm of each view's y and z are what reaches out_proj, in every layer, with left and right padding."""
    ids, mask = tokens(3, 19), torch.ones(3, 19, dtype=torch.bool)
    mask[0, :5] = False
    mask[1, -4:] = False
    reached: dict[str, torch.Tensor] = {}
    paths = [layer.path for layer in sspruner.trace(model).layers]
    handles = [
        model.get_submodule(f"{path}.out_proj").register_forward_pre_hook(
            lambda module, args, path=path: reached.__setitem__(path, args[0])
        )
        for path in paths
    ]
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask.long(), use_cache=False)
        for handle in handles:
            handle.remove()
        seen = views(model, ids, mask)
        assert [view.layer for view in seen] == paths
        for view in seen:
            mixer = model.get_submodule(view.layer)
            if hasattr(getattr(mixer, "norm", None), "weight"):
                made = mixer.norm(view.y.flatten(2), view.z)
            else:
                made = view.y.flatten(2) * torch.nn.functional.silu(view.z)
            torch.testing.assert_close(made[mask], reached[view.layer][mask], rtol=1e-4, atol=1e-5)


@given(models(dtypes=(torch.float32,)), st.sampled_from([(0.0, float("inf")), (0.3, 0.8)]))
def test_view_is_what_the_mixer_computes(model: torch.nn.Module, limit: tuple[float, float]) -> None:
    for layer in model.backbone.layers:
        layer.mixer.time_step_limit = limit
    check_views(model)


@pytest.mark.cover(most=5)
@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, {}) for family in FAMILIES),
        ("falcon_h1", {"mamba_rms_norm": False}),
        ("falcon_h1", {"mamba_norm_before_gate": False}),
    ],
    ids=str,
)
def test_view_is_what_the_mixer_computes_in_every_family(family: str, options: dict) -> None:
    """Multipliers, interleaved rows, norms on dt, B and C, and a norm that falcon_h1 may lack or put elsewhere."""
    check_views(zoo(family, **options))


@pytest.mark.exhaustive
@pytest.mark.slow
def test_statistics_on_real_text(reference: tuple, data_folder) -> None:
    """The same 1e-4 on the trained model's own activations, 300 tokens of a book, every layer."""
    model, tokenizer = reference
    text = (data_folder / "books-val.txt").read_text(encoding="utf-8")[20_000:23_000]
    check_every_layer(model, torch.tensor([tokenizer(text)["input_ids"][:300]]))


@pytest.mark.exhaustive
@pytest.mark.slow
def test_statistics_on_sampled_text(reference: tuple) -> None:
    """As above on text that the model wrote, so that it runs everywhere."""
    model, _ = reference
    check_every_layer(model, sspruner.calibration("self", model, samples=1, seq_len=150, held_out=0).tokens)


@torch.no_grad()
def check_every_layer(model: torch.nn.Module, ids: torch.Tensor) -> None:
    seen = views(model, ids)
    assert len(seen) == 6
    for view in seen:
        p, mask = view.projected, view.mask
        # elementwise: every single state's sum is right, not only the largest
        torch.testing.assert_close(view.ghost_sum, ghost_sum(p, mask), rtol=TOLERANCE, atol=0)
        torch.testing.assert_close(
            state.state_energy(p).double().sum((0, 1)), state_energy(p).sum((0, 1)), rtol=TOLERANCE, atol=0
        )
        close(view.gramian, gramian(p, mask))


def test_weights_only_view_refuses_activations() -> None:
    graph = sspruner.trace(model := tiny_model())
    layer = graph.layers[0]
    group, family = graph.groups[f"{layer.path}:state"], layer.family
    view = SSMView(Observation(model, layer.path, torch.ones(0, 0, dtype=torch.bool), family=family), group)
    assert view.weights["in_proj.weight:B"].shape == (1, 6, model.config.hidden_size)
    for name in ("hidden", "x", "y", "ghost_sum"):
        with pytest.raises(sspruner.PluginError, match=r"does not need activations read them"):
            getattr(view, name)
    with pytest.raises(sspruner.PluginError, match=r"set needs='gradients'"):
        _ = view.gradients
    with pytest.raises(sspruner.PluginError, match="only whole blocks have an output"):
        _ = view.output
