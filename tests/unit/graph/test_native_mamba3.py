"""Mamba3 of mamba_ssm: rotary pairs go together, and masked equals sliced in fp64.

The modules are the stand-ins of tests/support/native_mamba3.py. These are checked against the recurrence as a sum over
pairs of tokens, with rotations as complex numbers.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import sspruner
from sspruner.graph.families import mamba3
from sspruner.graph.families.mamba3 import NativeMamba3
from sspruner.graph.known import installed_families
from sspruner.plans.plan import Plan
from sspruner.surgery import proof
from sspruner.surgery import slice as slicing
from sspruner.surgery.predict import removed_parameters, removed_state_bytes
from sspruner.testing.plans import permute, plans, selection
from support.native import InferenceParams, MambaLMHeadModel, native_model
from support.native_mamba3 import Mamba3
from support.tiny import tokens

VARIANTS: dict[str, dict[str, Any]] = {
    "half": {},
    "whole": {"rope_fraction": 1.0},
    "groups-norm": {"ngroups": 2, "is_outproj_norm": True},
    "mimo": {"is_mimo": True, "rope_fraction": 1.0},
    "mimo-half-norm": {"is_mimo": True, "is_outproj_norm": True, "ngroups": 2},
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)
SCORERS = ["magnitude", "random", "taylor", "snip", "wanda"]


def build(variant: str = "half", dtype: torch.dtype = torch.float64, **options: Any) -> MambaLMHeadModel:
    """Return a random model; in fp64 every part of it computes in fp64."""
    model = native_model("Mamba3", dtype=dtype, **VARIANTS[variant] | options)
    for layer in model.backbone.layers:
        layer.residual_in_fp32 = False
    return model


@st.composite
def models(draw: st.DrawFn) -> MambaLMHeadModel:
    rope, mimo, groups = draw(st.sampled_from([0.5, 1.0])), draw(st.booleans()), draw(st.integers(1, 2))
    headdim, heads = draw(st.integers(2, 4)), 2 * draw(st.integers(1, 2))  # an even number: d_inner is 2 d_model
    return native_model(
        "Mamba3",
        dtype=torch.float64,
        d_model=headdim * heads * groups // 2,
        headdim=headdim,
        ngroups=groups,
        d_state=draw(st.sampled_from([8, 12, 16])),
        rope_fraction=rope,
        is_mimo=mimo,
        is_outproj_norm=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def mixers(model: nn.Module) -> list[Any]:
    return [layer.mixer for layer in model.backbone.layers]


@torch.no_grad()
def mixed(model: nn.Module) -> list[torch.Tensor]:
    """Return what every mixer makes of the same random input: fp64."""
    u = torch.randn(2, 11, model.config.d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [mixer(u) for mixer in mixers(model)]


def apart(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(float((a - e).abs().max() / e.abs().max()) for a, e in zip(actual, expected, strict=True))


def one_axis(model: nn.Module, axis: str, after: int) -> Plan:
    groups = sspruner.trace(model).on_axis(axis)
    return Plan({n: selection(g.groups, g.units, after, seed=i) for i, (n, g) in enumerate(groups.items())})


# The stand-in


@torch.no_grad()
@each_variant
def test_the_stand_in_computes_the_recurrence(variant: str) -> None:
    """Each token's x reaches every later y through l dt of its own and (1 - l) dt of the next token, and a rotation."""
    mixer = mixers(build(variant))[0]
    u = torch.randn(1, 7, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z, x, k, q, dt, decay, new, turns = (value[0] for value in mixer.scan_inputs(u))
    S, N, ranks = mixer.num_rope_angles, mixer.d_state, range(mixer.mimo_rank)
    first = torch.arange(N // 2) if mixer.is_mimo else torch.arange(0, N, 2)
    second = first + (N // 2 if mixer.is_mimo else 1)
    total = torch.zeros(7, mixer.nheads, N // 2, dtype=torch.float64)
    total[..., :S] = turns.cumsum(0)
    k, q = (torch.complex(v[..., first], v[..., second]) * torch.exp(1j * total)[:, None] for v in (k, q))
    one = torch.ones(mixer.nheads, len(ranks), mixer.headdim, dtype=torch.float64)
    up, gate, down = (getattr(mixer, name, one) for name in ("mimo_x", "mimo_z", "mimo_o"))
    out = torch.zeros_like(x)
    for t in range(7):
        for r in ranks:
            y = mixer.D[:, None] * up[:, r] * x[t]  # (H, P)
            for s in range(t + 1):
                weight = new[s] * dt[s] + ((1 - new[s + 1]) * dt[s + 1] if s < t else 0)
                weight = weight * decay[s + 1 : t + 1].prod(0)
                for w in ranks:
                    read = (q[t, r] * k[s, w].conj()).real.sum(-1)  # (H,)
                    y = y + (weight * read)[:, None] * up[:, w] * x[s]
            if mixer.is_outproj_norm:
                y = y / (y.square().mean(-1, keepdim=True) + mixer.norm.eps).sqrt() * mixer.norm.weight.view_as(y)
            out[t] += down[:, r] * y * torch.nn.functional.silu(gate[:, r] * z[t])
    torch.testing.assert_close(mixer(u)[0], mixer.out_proj(out.flatten(1)), rtol=1e-10, atol=1e-12)
    assert (turns.abs().amax() / math.pi) > 0.1, "nothing rotates"


@each_variant
def test_decoding_with_a_cache_is_one_forward_of_a_cut_model_too(variant: str) -> None:
    model, ids = build(variant), tokens(length=9)
    sspruner.apply(model, one_axis(model, "state", 2))
    params = InferenceParams(9, 2)
    with torch.no_grad():
        parts = [model(chunk, inference_params=params).logits for chunk in ids.split([4] + [1] * 5, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, rtol=1e-9, atol=1e-9)


# What is seen


def test_mamba3_is_traced_by_its_attributes() -> None:
    graph = sspruner.trace(build("groups-norm"))
    assert [site.kind for site in graph.layers] == ["mamba_ssm.Mamba3"] * 2
    assert {g.axis: (g.groups, g.units) for g in graph.groups_of(graph.layers[0])} == {
        "state": (1, 4),
        "head": (2, 2),
        "head_dim": (4, 4),
        "group": (1, 2),
    }
    assert graph.layers[0].state_bytes == 4 * 4 * 16 * 4  # heads, head dim, states, fp32
    assert proof.measured_state_bytes(build("groups-norm"), tokens()) == graph.state_bytes


@pytest.mark.parametrize(
    ("variant", "states"),
    [("half", [2, 3, 10, 11]), ("whole", [2, 3]), ("mimo", [1, 9]), ("mimo-half-norm", [1, 5, 9, 13])],
)
def test_a_unit_of_the_state_is_a_rotary_pair_and_its_angle(variant: str, states: list[int]) -> None:
    """N = 16: neighbours rotate together, with MIMO n and n + 8; if half rotate, one pair of the others goes along."""
    model = build(variant)
    group, mixer = sspruner.trace(model).groups["backbone.layers.0.mixer:state"], mixers(model)[0]
    unit = {(m.tensor.rpartition("mixer.")[2], m.rows): sorted(m.index[0, 1].tolist()) for m in group.members}
    for name in ("B", "C"):
        assert unit[f"{name}_norm.weight", name] == unit[f"{name}_bias", name] == states
    rows, before = mixer.mimo_rank * mixer.num_bc_heads, 2 * mixer.d_inner
    assert unit["in_proj.weight", "B"] == [before + 16 * run + n for run in range(rows) for n in states]
    assert unit["in_proj.weight", "C"] == [before + 16 * (rows + run) + n for run in range(rows) for n in states]
    assert unit["in_proj.weight", "angle"] == [mixer.in_proj.out_features - mixer.num_rope_angles + 1]


@each_variant
def test_every_parameter_is_described_to_its_last_row(variant: str) -> None:
    mixer = mixers(build(variant))[0]
    layout = NativeMamba3().layout(mixer)
    assert layout == NativeMamba3().layout(copy.deepcopy(mixer).to("meta"))
    described = {slot.tensor for slot in layout.slots}
    for name, parameter in mixer.named_parameters():
        assert name in described
        for slot in (s for s in layout.slots if s.tensor == name):
            extent = math.prod(parameter.shape[d] for d in slot.tensor_dims)
            assert sum(layout.count(slot.outer + rows.dims) for rows in slot.rows) == extent, (name, slot)


@each_variant
def test_mamba3_is_of_one_family(variant: str) -> None:
    for module in build(variant).modules():
        found = [f.name for f in installed_families().values() if f.recognises(module)]
        assert found == ["mamba_ssm.Mamba3"] * isinstance(module, Mamba3)


def test_a_module_with_more_parameters_is_not_recognised() -> None:
    mixer = mixers(build())[0]
    mixer.A_log = nn.Parameter(torch.zeros(4))
    assert not NativeMamba3().recognises(mixer)


def test_pairs_to_which_no_whole_number_of_others_falls_are_refused() -> None:
    with pytest.raises(sspruner.ModelError, match=r"mamba_ssm\.Mamba3: 4 of 10 states rotate; to be cut, it needs"):
        sspruner.trace(build(d_state=10))


def test_an_odd_number_of_angles_is_refused_where_the_kernel_takes_none() -> None:
    model = build("whole")
    with pytest.raises(sspruner.PlanError, match="multiple of 2"):
        sspruner.apply(model, one_axis(model, "state", 3))
    sspruner.apply(build("mimo"), one_axis(build("mimo"), "state", 3))


# Masked = sliced


@given(st.data())
def test_masked_equals_sliced(data: st.DataObject) -> None:
    """Any axes of any layers at once, to any sizes; by each mixer on the same input, in fp64."""
    model = data.draw(models())
    graph = sspruner.trace(model)
    plan = data.draw(plans(graph))
    predicted = removed_parameters(model, plan, graph), removed_state_bytes(plan, graph)
    masked = sspruner.apply(copy.deepcopy(model), plan, mode="mask")
    sliced = sspruner.apply(copy.deepcopy(model), plan)
    assert apart(mixed(sliced), mixed(masked)) < 1e-9
    after = sspruner.trace(sliced)
    assert (graph.parameters - after.parameters, graph.state_bytes - after.state_bytes) == predicted
    assert proof.measured_state_bytes(sliced, tokens()) == after.state_bytes
    for mixer in mixers(sliced):  # as __init__ would have set them
        assert (
            mixer.split_tensor_size == 2 * mixer.num_rope_angles == 4 * mixer.d_state // mixer.rotary_dim_divisor // 2
        )
        assert mixer.d_inner == mixer.nheads * mixer.headdim == mixer.out_proj.in_features


@given(st.data())
def test_units_are_interchangeable(data: st.DataObject) -> None:
    model = data.draw(models())
    before = mixed(model)
    axis = data.draw(st.sampled_from(sspruner.trace(model).axes))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    for group in sspruner.trace(model).on_axis(axis).values():
        permute(
            model, group, torch.stack([torch.randperm(group.units, generator=generator) for _ in range(group.groups)])
        )
    assert apart(mixed(model), before) < 1e-9


@pytest.mark.parametrize(
    ("variant", "axis"), [("half", "state"), ("mimo", "state"), ("groups-norm", "head_dim"), ("half", "head")]
)
def test_what_is_masked_changes_the_output(variant: str, axis: str) -> None:
    model = build(variant)
    masked = sspruner.apply(copy.deepcopy(model), one_axis(model, axis, 2), mode="mask")
    assert apart(mixed(masked), mixed(model)) > 1e-3


@pytest.mark.parametrize(("variant", "dims"), [("whole", "PAIRED"), ("half", "PAIRED"), ("mimo", "HALVES")])
def test_a_broken_pair_is_caught(monkeypatch: pytest.MonkeyPatch, variant: str, dims: str) -> None:
    """Units that take one state from each of two pairs."""
    whole = {"PAIRED": ("kind", "half", "state"), "HALVES": ("kind", "state", "half")}
    monkeypatch.setattr(mamba3, dims, whole[dims])
    model = build(variant)
    with pytest.raises(sspruner.ProofError, match="logits differ"):
        sspruner.apply(model, one_axis(model, "state", 2))


@pytest.mark.parametrize(("variant", "axis"), [("half", "state"), ("groups-norm", "head_dim")])
def test_the_folds_are_needed(monkeypatch: pytest.MonkeyPatch, variant: str, axis: str) -> None:
    model = build(variant)
    monkeypatch.setattr(slicing, "fold_values", lambda *args: None)
    with pytest.raises(sspruner.ProofError, match="logits differ"):
        sspruner.apply(model, one_axis(model, axis, 2))


# Scores


@pytest.mark.parametrize("scorer", SCORERS)
def test_prune(scorer: str) -> None:
    model = build("groups-norm", torch.float32)
    before = sspruner.trace(model)
    axes = {"state": 0.5, "head": 0.5, "head_dim": 0.5}
    result = sspruner.prune(model, scorer, axis=axes, calibration=tokens(batch=4, length=16))
    after = sspruner.trace(model)
    assert after.state_bytes * 8 == before.state_bytes
    assert before.parameters - after.parameters == result.report.proof.parameters_removed > 0


@pytest.mark.parametrize("axis", ["head", "head_dim"])
def test_flap_reads_what_out_proj_is_fed_and_adds_a_bias_to_it(axis: str) -> None:
    model = build(dtype=torch.float32)
    sspruner.prune(model, "flap", axis=axis, sparsity=0.5, calibration=tokens(batch=4, length=16))
    mixer = mixers(model)[0]
    assert getattr(mixer, {"head": "nheads", "head_dim": "headdim"}[axis]) == 2
    assert mixer.out_proj.bias is not None
    assert NativeMamba3().recognises(mixer)


@pytest.mark.parametrize(
    ("scorer", "why"),
    [(name, r"scan of mamba_ssm\.Mamba3.* is not known here") for name in ("ghost", "rrqr", "last")]
    + [("balanced", "B and C are rotated by an angle")],
)
def test_scorers_of_the_scan_are_refused_in_one_line(scorer: str, why: str) -> None:
    with pytest.raises(sspruner.InputError, match=why) as caught:
        sspruner.prune(build(dtype=torch.float32), scorer, axis="state", calibration=tokens(batch=2, length=16))
    assert "\n" not in str(caught.value)


def test_last_is_refused_by_its_weights_too() -> None:
    with pytest.raises(sspruner.InputError, match="last: the decay depends on the token here"):
        sspruner.score(build(), "last", axis="state", options={"input": "weights"})


# The package itself


def test_the_module_of_mamba_ssm_itself() -> None:
    pytest.importorskip("mamba_ssm.modules.mamba3", reason="mamba_ssm is not installed: it needs a GPU")
    if not torch.cuda.is_available():
        pytest.skip("the kernels of mamba_ssm need a GPU")
    from mamba_ssm.modules.mamba3 import Mamba3 as Real

    torch.manual_seed(0)
    real = Real(128, d_state=64, headdim=32, layer_idx=0, device="cuda", dtype=torch.bfloat16)
    ours = Mamba3(128, d_state=64, headdim=32).to("cuda")
    ours.load_state_dict({name: value.float() for name, value in real.state_dict().items()})
    u = torch.randn(2, 70, 128, device="cuda", dtype=torch.bfloat16)
    assert NativeMamba3().layout(real) == NativeMamba3().layout(ours)
    with torch.no_grad():
        assert apart([real(u).float()], [ours(u.float())]) < 3e-2
