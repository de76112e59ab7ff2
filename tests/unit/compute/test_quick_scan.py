"""Quick scans: the recurrence itself, step by step in fp64, and its gradients; the rest is left to others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

from sspruner.compute import quick_scan
from sspruner.compute.quick_scan import (
    Recurrence,
    Wanted,
    chunk_scan,
    quadratic_scan,
    quick_scans,
    quick_streams,
    selective_scan,
)
from support.examples import examples
from support.zoo import zoo

EVERYTHING = Wanted(frozenset({"x", "dt", "B", "C"}), torch.arange(4))


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mamba2_inputs(b: int, T: int, G: int, K: int, P: int, N: int) -> dict[str, torch.Tensor]:
    values = {"x": normal(0, b, T, G * K, P), "dt": normal(1, b, T, G * K).exp(), "A": -normal(2, G * K).exp()}
    values |= {"B": normal(3, b, T, G, N), "C": normal(4, b, T, G, N)}
    return {name: value.requires_grad_() for name, value in values.items()}


def stepped(x: Any, dt: Any, A: Any, B: Any, C: Any) -> torch.Tensor:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t; y_t = h_t C_t."""
    b, T, H, P = x.shape
    K = H // B.shape[2]
    B, C = (rows.repeat_interleave(K, 2) for rows in (B, C))
    h, y = x.new_zeros(b, H, P, B.shape[-1]), []
    for t in range(T):
        h = (dt[:, t] * A).exp()[..., None, None] * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        y.append((h * C[:, t, :, None]).sum(-1))
    return torch.stack(y, 1)


@given(T=st.integers(1, 13), groups=st.integers(1, 2), heads=st.integers(1, 2), piece=st.integers(1, 14))
@examples(6)
def test_the_quadratic_form_is_the_recurrence(T, groups, heads, piece):
    inputs = mamba2_inputs(2, T, groups, heads, 3, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quick_scan, "QUADRATIC", piece)
        found = quadratic_scan(**inputs)
        gradients = torch.autograd.grad(found.square().sum(), [*inputs.values()])
    expected = stepped(**inputs)
    assert torch.allclose(found, expected)
    for name, one, other in zip(
        inputs, gradients, torch.autograd.grad(expected.square().sum(), [*inputs.values()]), strict=True
    ):
        assert torch.allclose(one, other), name


def test_the_recurrence_has_the_gradients_of_its_definition():
    a, u = normal(0, 5, 2, 3).sigmoid().requires_grad_(), normal(1, 5, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(Recurrence.apply, (a, u))
    h = torch.zeros(2, 3, dtype=torch.float64)
    for t, found in enumerate(Recurrence.apply(a, u)):
        h = a[t] * h + u[t]
        assert torch.allclose(found, h)


@pytest.mark.parametrize("given", [("D", "z"), ("D", "delta_bias", "delta_softplus"), ()], ids=str)
def test_mamba1_is_what_its_code_computes(given):
    D, N, T = 6, 5, 11
    x, dt, A = normal(0, 2, D, T), normal(1, 2, D, T).exp(), -normal(2, D, N).exp()
    B, C = normal(3, 2, N, T), normal(4, 2, N, T)
    B[:, 1], C[:, 1], B[:, 2] = 0, 0, 0  # a state that was cut, and one that only reads
    options = {"D": normal(5, D), "z": normal(6, 2, D, T), "delta_bias": normal(7, D), "delta_softplus": True}
    inputs = [t.float().requires_grad_() for t in (x, dt, A, B, C)]
    how = {
        name: value.float() if name != "delta_softplus" else value for name, value in options.items() if name in given
    }
    stock = modeling_mamba.mamba_selective_scan
    expected, found = stock(*inputs, **how), selective_scan(None, EVERYTHING, *inputs, **how)
    assert torch.allclose(found, expected, atol=1e-5)
    weights = normal(8, *found.shape).float()
    for one, other in zip(
        *(torch.autograd.grad((out * weights).sum(), inputs) for out in (found, expected)), strict=True
    ):
        assert torch.allclose(one[:, :1], other[:, :1], atol=1e-4)
        assert torch.allclose(one[:, 2:], other[:, 2:], atol=1e-4)  # of what was cut, none is computed


def test_mamba2_is_what_its_code_computes():
    values = {name: value.detach().float() for name, value in mamba2_inputs(2, 11, 2, 2, 3, 4).items()}
    how = {"chunk_size": 4, "D": normal(5, 4).float(), "dt_bias": normal(6, 4).float(), "dt_softplus": True}
    how |= {"dt_limit": (0.1, 1.0), "initial_states": None, "return_final_states": False, "z": None}
    stock = modeling_mamba2.mamba2_chunk_scan
    expected = stock(*values.values(), **how)
    assert torch.allclose(chunk_scan(None, EVERYTHING, *values.values(), **how), expected, atol=1e-5)
    again, state = chunk_scan(stock, EVERYTHING, *values.values(), **{**how, "return_final_states": True})
    assert torch.equal(again, expected)
    assert state.shape == (2, 4, 3, 4)


def test_the_code_of_a_family_has_its_own_scans_again():
    mixer = zoo("mamba2").backbone.layers[0].mixer
    before = modeling_mamba2.mamba2_chunk_scan, modeling_mamba2.causal_conv1d_fn
    with quick_scans(mixer, EVERYTHING):
        assert modeling_mamba2.mamba2_chunk_scan is not before[0]
    assert (modeling_mamba2.mamba2_chunk_scan, modeling_mamba2.causal_conv1d_fn) == before


def test_streams_are_quick_only_where_no_gradient_is_recorded_and_on_a_cpu(monkeypatch):
    model, ids, ran = zoo("mamba2"), torch.arange(24).view(2, 12), []
    quadratic, stock = quick_scan.quadratic_scan, modeling_mamba2.mamba2_chunk_scan
    monkeypatch.setattr(quick_scan, "quadratic_scan", lambda *args: ran.append(1) or quadratic(*args))
    expected = model(input_ids=ids, use_cache=False).logits
    with quick_streams(model, torch.device("cpu")):
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)
        assert not ran
        with torch.no_grad():
            assert torch.allclose(model(input_ids=ids, use_cache=False).logits, expected, atol=1e-4)
        assert len(ran) == len(model.backbone.layers)
        wide = model.bfloat16()
        with torch.no_grad():
            assert torch.allclose(wide(input_ids=ids, use_cache=False).logits.float(), expected, atol=0.2)
    assert modeling_mamba2.mamba2_chunk_scan is stock
    with quick_streams(model, torch.device("cuda")):
        assert modeling_mamba2.mamba2_chunk_scan is stock


def test_a_class_whose_module_cannot_be_found_runs_as_it_is():
    model = zoo("mamba2")
    mixer = model.backbone.layers[0].mixer
    mixer.__class__ = type("Elsewhere", (type(mixer),), {"__module__": "nowhere"})
    with quick_streams(model, torch.device("cpu")), quick_scans(mixer, EVERYTHING):
        assert model(input_ids=torch.arange(6)[None], use_cache=False).logits.isfinite().all()
