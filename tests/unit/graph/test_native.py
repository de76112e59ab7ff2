"""Modules of mamba_ssm: traced by what they hold, cut and scored like transformers' mixers.

Most of this runs on tests/support/native.py, stand-ins under the same names; the last tests run on the package where it
is installed.
"""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import sspruner
from sspruner.calibrate import selective, state
from sspruner.calibrate.view import SSMView
from sspruner.graph.family import Projected
from sspruner.graph.known import installed_families
from sspruner.graph.ssm_graph import SSMGraph
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Selection
from sspruner.surgery import proof
from sspruner.surgery.predict import removed_parameters, removed_state_bytes
from support.native import InferenceParams, Mamba, Mamba2, MambaLMHeadModel, native_model
from support.tiny import tokens
from support.zoo import FAMILIES, zoo

WITH_MLP = {"d_model": 12, "d_ssm": 16, "ngroups": 2}  # 8 of 24 channels are a gated MLP
VARIANTS: dict[str, dict[str, Any]] = {
    "mamba2": {},
    "mamba2-groups": {"ngroups": 2, "bias": True},
    "mamba2-mlp": WITH_MLP | {"bias": True},
    "mamba2-mlp-hdim": WITH_MLP | {"D_has_hdim": True, "norm_before_gate": True, "dt_limit": (0.3, 1.5)},
    "mamba2-no-norm": {"rmsnorm": False, "ngroups": 2, "conv_bias": False, "rms_norm": False, "tied": False},
    "mamba1": {"layer": "Mamba1"},
    "mamba1-bias": {"layer": "Mamba1", "bias": True, "conv_bias": False, "tied": False},
}
AXES = {"Mamba2": ["state", "head", "head_dim", "group", "mlp"], "Mamba1": ["state", "channel", "dt_rank"]}
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def build(variant: str, **overrides: Any) -> MambaLMHeadModel:
    return native_model(**VARIANTS[variant] | overrides)


def mixers(model: nn.Module) -> list[Any]:
    return [layer.mixer for layer in model.backbone.layers]


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits.float()


def assert_same(actual: torch.Tensor, masked: nn.Module, ids: torch.Tensor, least: float = 1e-5) -> None:
    """Equal to the masked model's logits, but for what a few roundings of its embeddings do to them."""
    expected = logits(masked, ids)
    noise = torch.randn(masked.config.d_model, generator=torch.Generator().manual_seed(0))
    hook = masked.backbone.embedding.register_forward_hook(lambda _m, _ids, out: out * (1 + 2.0**-22 * noise))
    rounding = (logits(masked, ids) - expected).abs().max() / expected.abs().max()
    hook.remove()
    assert rounding < 1e-3, "this model cannot tell a right cut from a wrong one"
    assert (actual - expected).abs().max() <= max(least, 8 * float(rounding)) * expected.abs().max()


def random_plan(graph: SSMGraph, axes: list[str], seed: int = 0, keep: int | None = None) -> Plan:
    """Half of the units of some axes, chosen at random in every group of every layer."""
    generator = torch.Generator().manual_seed(seed)
    groups = {}
    for name, group in graph.groups.items():
        if group.axis in axes:
            after = keep or max(1, group.units // 2)
            kept = [
                sorted(torch.randperm(group.units, generator=generator)[:after].tolist()) for _ in range(group.groups)
            ]
            groups[name] = Selection(group.units, tuple(map(tuple, kept)))
    return Plan(groups)


# What is seen


def test_mamba2_is_traced_by_its_attributes() -> None:
    graph = sspruner.trace(build("mamba2-mlp"))
    assert [(site.path, site.kind) for site in graph.layers] == [
        (f"backbone.layers.{i}.mixer", "mamba_ssm.Mamba2") for i in range(2)
    ]
    shape = {g.axis: (g.groups, g.units) for g in graph.groups_of(graph.layers[0])}
    assert shape == {"state": (2, 6), "head": (2, 2), "head_dim": (4, 4), "group": (1, 2), "mlp": (1, 8)}
    assert graph.layers[0].state_bytes == 4 * 4 * 6 * 4  # heads, head dim, state, fp32
    assert graph.blocks == "backbone.layers"
    assert {g.state_bytes_per_unit for g in graph.on_axis("mlp").values()} == {0}


def test_the_mlp_of_mamba2_lies_before_everything_else() -> None:
    group = sspruner.trace(build("mamba2-mlp")).groups["backbone.layers.0.mixer:mlp"]
    rows = {
        (m.tensor.removeprefix("backbone.layers.0.mixer."), m.rows): m.index.flatten().tolist() for m in group.members
    }
    z0, x0 = list(range(8)), list(range(8, 16))
    assert rows == {
        ("in_proj.weight", "z0"): z0,
        ("in_proj.weight", "x0"): x0,
        ("in_proj.bias", "z0"): z0,
        ("in_proj.bias", "x0"): x0,
        ("out_proj.weight", "mlp"): z0,
    }


def test_the_rows_of_a_head_lie_behind_the_mlp() -> None:
    group = sspruner.trace(build("mamba2-mlp")).groups["backbone.layers.0.mixer:head"]
    last = {(m.tensor.rpartition("mixer.")[2], m.rows): m.index[-1, -1].tolist() for m in group.members}
    M, D, GN = 8, 16, 12
    assert last[("in_proj.weight", "z")] == list(range(2 * M + D - 4, 2 * M + D))
    assert last[("in_proj.weight", "x")] == list(range(2 * M + 2 * D - 4, 2 * M + 2 * D))
    assert last[("in_proj.weight", "dt")] == [2 * M + 2 * D + 2 * GN + 3]
    assert last[("conv1d.weight", "x")] == list(range(D - 4, D))
    assert last[("out_proj.weight", "y")] == list(range(M + D - 4, M + D))


def test_without_an_mlp_or_groups_there_are_no_such_axes() -> None:
    assert sspruner.trace(build("mamba2")).axes == ("state", "head", "head_dim")


def test_mamba1_is_traced_by_its_attributes() -> None:
    graph = sspruner.trace(build("mamba1"))
    assert [site.kind for site in graph.layers] == ["mamba_ssm.Mamba"] * 2
    assert {g.axis: (g.groups, g.units) for g in graph.groups_of(graph.layers[0])} == {
        "state": (1, 6),
        "channel": (1, 16),
        "dt_rank": (1, 3),
    }
    assert graph.layers[0].state_bytes == 16 * 6 * 4


@each_variant
def test_every_parameter_of_a_mixer_is_described_to_its_last_row(variant: str) -> None:
    mixer = mixers(build(variant))[0]
    family = next(f for f in installed_families().values() if f.recognises(mixer))
    layout = family.layout(mixer)
    for name, parameter in mixer.named_parameters():
        for slot in (s for s in layout.slots if s.tensor == name):
            assert sum(layout.count(rows.dims) for rows in slot.rows) == parameter.shape[slot.dim], (name, slot)


@pytest.mark.parametrize("family", FAMILIES)
def test_mixers_of_transformers_are_not_mistaken_for_native_ones(family: str) -> None:
    for module in zoo(family).modules():
        found = [f.name for f in installed_families().values() if f.recognises(module)]
        assert found in ([], [family])


@each_variant
def test_native_mixers_are_of_one_family(variant: str) -> None:
    for module in build(variant).modules():
        found = [f.name for f in installed_families().values() if f.recognises(module)]
        assert len(found) == isinstance(module, (Mamba, Mamba2))


def test_a_variant_with_more_parameters_is_not_recognised() -> None:
    """Vision Mamba scans both ways: a cut of one way alone would be wrong."""
    model = build("mamba1")
    for mixer in mixers(model):
        mixer.A_b_log = nn.Parameter(mixer.A_log.detach().clone())
    with pytest.raises(sspruner.ModelError, match="no state-space layer found"):
        sspruner.trace(model)


def test_a_model_on_meta_is_traced() -> None:
    model = build("mamba2-mlp", tied=False)  # torch unties on the way to meta
    there = str(sspruner.trace(model))
    assert str(sspruner.trace(model.to("meta"))) == there


def test_a_model_whose_kernels_need_a_gpu_is_traced_on_the_cpu() -> None:
    def forward(self, u, **kwargs):
        raise RuntimeError("Expected x.is_cuda() to be true")

    model = build("mamba2-mlp")
    there = str(sspruner.trace(model))
    for mixer in mixers(model):
        mixer.__class__ = type("Mamba2", (Mamba2,), {"__module__": "mamba_ssm.modules.mamba2", "forward": forward})
    assert str(sspruner.trace(model)) == there


@pytest.mark.parametrize("variant", ["mamba2", "mamba2-mlp"])
def test_channels_of_y_are_counted_without_the_columns_of_an_mlp(variant: str) -> None:
    """out_proj's columns are those of the gated MLP first, if there is one, then those of y."""
    graph = sspruner.trace(build(variant))
    layer = graph.layers[0]
    H, P = layer.layout.total((("group", "head"),)), layer.layout.sizes["head_dim"]
    channels = torch.arange(H * P, dtype=torch.float64).view(H, P)
    for axis, wanted in (("head", channels.sum(1)), ("head_dim", channels)):
        group = graph.groups[f"{layer.path}:{axis}"]
        found = SSMView.by_unit(SimpleNamespace(group=group), channels)
        assert torch.equal(found.flatten(), wanted.flatten())


# Cuts


@pytest.mark.ci_cover
@pytest.mark.cover(most=4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("variant", "axis"), [(v, axis) for v in VARIANTS for axis in AXES[VARIANTS[v].get("layer", "Mamba2")]]
)
def test_masked_equals_sliced(variant: str, axis: str, dtype: torch.dtype) -> None:
    model, ids = build(variant, dtype=dtype), tokens()
    graph = sspruner.trace(model)
    if axis not in graph.axes:
        with pytest.raises(sspruner.InputError, match=f"axis '{axis}'"):
            graph.on_axis(axis)
        return
    plan = random_plan(graph, [axis], seed=1)
    masked = sspruner.apply(copy.deepcopy(model), plan, mode="mask").float()
    sliced = sspruner.apply(model, plan)
    assert {p.dtype for p in sliced.parameters()} == {dtype}
    folded = axis in ("head", "head_dim") and dtype == torch.bfloat16  # the norm's weight is rounded to bf16 again
    assert_same(logits(sliced.float(), ids), masked, ids, least=2e-2 if folded else 1e-5)
    after = sspruner.trace(sliced)
    assert {n: g.units for n, g in after.groups.items() if n in plan.groups} == {
        n: s.after for n, s in plan.groups.items() if n in after.groups
    }


@st.composite
def native_models(draw: st.DrawFn) -> MambaLMHeadModel:
    """Either module with any of its options."""
    options: dict[str, Any] = {name: draw(st.booleans()) for name in ("bias", "conv_bias", "tied", "rms_norm")} | {
        "d_state": draw(st.integers(1, 8)),
        "d_conv": draw(st.integers(2, 4)),
        "seed": draw(st.integers(0, 2**16)),
    }
    if draw(st.booleans()):
        return native_model("Mamba1", dt_rank=draw(st.integers(1, 4)), d_model=draw(st.sampled_from([4, 8])), **options)
    headdim, ngroups, heads = draw(st.integers(3, 6)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    d_ssm, extra = ngroups * heads * headdim, draw(st.sampled_from([0, 2, 6]))
    if (d_ssm + extra) % 2:  # d_inner = 2 d_model
        extra += 1
    return native_model(
        "Mamba2",
        d_model=(d_ssm + extra) // 2,
        d_ssm=d_ssm,
        headdim=headdim,
        ngroups=ngroups,
        D_has_hdim=draw(st.booleans()),
        rmsnorm=draw(st.booleans()),
        norm_before_gate=draw(st.booleans()),
        dt_limit=draw(st.sampled_from([(0.0, float("inf")), (0.2, 1.0)])),
        **options,
    )


@pytest.mark.slow
@given(st.data())
def test_any_axes_at_once(data: st.DataObject) -> None:
    """Any dependency groups of any layers, cut to any sizes, in one pass with one proof."""
    model = data.draw(native_models())
    graph, ids = sspruner.trace(model), tokens()
    names = data.draw(
        st.lists(st.sampled_from([n for n, g in graph.groups.items() if g.units > 1] or [""]), unique=True)
    )
    chosen = {}
    for name in filter(None, names):
        group = graph.groups[name]
        after = data.draw(st.integers(1, group.units - 1))
        kept = [sorted(data.draw(st.permutations(range(group.units)))[:after]) for _ in range(group.groups)]
        chosen[name] = Selection(group.units, tuple(map(tuple, kept)))
    if not chosen:
        return
    plan = Plan(chosen)
    predicted = removed_parameters(model, plan, graph), removed_state_bytes(plan, graph)
    masked = sspruner.apply(copy.deepcopy(model), plan, mode="mask")
    sliced = sspruner.apply(copy.deepcopy(model), plan)
    assert_same(logits(sliced, ids), masked, ids)
    after = sspruner.trace(sliced)
    assert (graph.parameters - after.parameters, graph.state_bytes - after.state_bytes) == predicted


@pytest.mark.cover(most=3)
@each_variant
def test_decoding_with_the_cache_of_a_cut_model(variant: str) -> None:
    """Caches have the sizes that the cut mixers need: decoded token by token, and after a prompt, it is one forward."""
    model, ids = build(variant), tokens(length=11)
    sspruner.apply(model, random_plan(sspruner.trace(model), ["state", "head", "channel", "mlp"]))
    expected = logits(model, ids)
    for chunks in ([1] * 11, [6] + [1] * 5):
        params = InferenceParams(11, 2, key_value_memory_dict=model.allocate_inference_cache(2, 11))
        with torch.no_grad():
            parts = [model(chunk, inference_params=params).logits for chunk in ids.split(chunks, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.cover(most=3)
@each_variant
def test_the_state_that_the_model_allocates_falls_as_predicted(variant: str) -> None:
    model = build(variant)
    graph = sspruner.trace(model)
    plan = random_plan(graph, ["state", "head_dim", "channel"])

    def allocated() -> int:
        return sum(s[0].numel() * 4 for _, s in model.allocate_inference_cache(1, 8).values())

    before = allocated()
    assert before == graph.state_bytes == proof.measured_state_bytes(model, tokens())
    sspruner.apply(model, plan)
    assert before - allocated() == removed_state_bytes(plan, graph) > 0
    assert allocated() == sspruner.trace(model).state_bytes


def test_attention_keeps_no_state() -> None:
    model = build("mamba2")
    model.backbone.layers[0].allocate_inference_cache = lambda b, T, **_: torch.zeros(b, T, 2, 1, 4)
    assert proof.measured_state_bytes(model, tokens(batch=3)) == sspruner.trace(model).layers[1].state_bytes


@pytest.mark.parametrize("variant", ["mamba2-mlp", "mamba1"])
def test_a_tied_head_stays_tied(variant: str) -> None:
    model = build(variant)
    plan = random_plan(sspruner.trace(model), ["state", "head", "channel"])
    sspruner.apply(model, plan)
    assert model.lm_head.weight is model.backbone.embedding.weight
    model.tie_weights()
    assert model.lm_head.weight is model.backbone.embedding.weight


def test_the_integers_that_forward_reads_are_right_after_a_cut() -> None:
    model = build("mamba2-mlp")
    graph = sspruner.trace(model)
    keep = {"state": 3, "head": 1, "head_dim": 2, "mlp": 5}
    groups: dict[str, Selection] = {}
    for axis, count in keep.items():
        groups |= random_plan(graph, [axis], keep=count).groups
    sspruner.apply(model, Plan(groups))
    mixer = mixers(model)[0]
    names = ("d_state", "nheads", "ngroups", "headdim", "d_ssm", "d_inner")
    assert {n: getattr(mixer, n) for n in names} == dict(zip(names, (3, 2, 2, 2, 4, 9), strict=True))
    assert mixer.norm.group_size == 2
    assert mixer.in_proj.out_features == 2 * 9 + 2 * 2 * 3 + 2
    assert mixer.out_proj.in_features == 9
    assert mixer.conv1d.groups == 4 + 2 * 2 * 3


@pytest.mark.parametrize(("before_gate", "axis"), [(False, "head"), (True, "head_dim")])
def test_the_fold_of_the_gated_norm_is_needed(monkeypatch: pytest.MonkeyPatch, before_gate: bool, axis: str) -> None:
    model = build("mamba2-mlp", norm_before_gate=before_gate)
    plan = random_plan(sspruner.trace(model), [axis])
    monkeypatch.setattr("sspruner.surgery.slice.fold_values", lambda *args: None)
    with pytest.raises(sspruner.ProofError, match="logits differ"):
        sspruner.apply(model, plan)


def test_a_cut_of_the_wrong_rows_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the MLP's two halves lay in the other order than x and z."""
    from sspruner.graph.families import mamba_ssm

    monkeypatch.setattr(mamba_ssm, "NATIVE_ROWS", (*mamba_ssm.NATIVE_ROWS[2:], *mamba_ssm.NATIVE_ROWS[:2]))
    model = build("mamba2-mlp")
    with pytest.raises(sspruner.ProofError, match="logits differ"):
        sspruner.apply(model, random_plan(sspruner.trace(model), ["head"]))


def test_the_cut_is_recorded_in_a_config_that_is_a_plain_dataclass() -> None:
    model = build("mamba1")
    plan = random_plan(sspruner.trace(model), ["state"])
    sspruner.apply(model, plan)
    written = json.loads(json.dumps(model.config.__dict__))  # as its save_pretrained writes it
    assert [Plan.from_json(cut).groups for cut in written["sspruner"]["cuts"]] == [plan.groups]
    assert written["n_layer"] == 2


# Scores


@torch.no_grad()
def mixer_inputs(model: nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    hooks = [m.register_forward_pre_hook(lambda _m, args: seen.append(args[0])) for m in mixers(model)]
    model(ids)
    for hook in hooks:
        hook.remove()
    return seen


@each_variant
@torch.no_grad()
def test_project_is_what_the_mixer_feeds_to_its_scan(variant: str) -> None:
    """From its result, norm and out_proj give the mixer's output."""
    model, ids = build(variant), tokens()
    mixer, hidden = mixers(model)[1], mixer_inputs(model, ids)[1]
    family = next(f for f in installed_families().values() if f.recognises(mixer))
    mask = torch.ones_like(ids, dtype=torch.bool)
    p = family.project(mixer, hidden, mask)
    y = (state if isinstance(p, Projected) else selective).scan_output(p).flatten(-2)
    y = mixer.norm(y, p.z) if getattr(mixer, "rmsnorm", False) else y * mixer.act(p.z)
    if isinstance(mixer, Mamba2):
        z0, x0 = mixer.in_proj(hidden)[..., : 2 * (mixer.d_inner - mixer.d_ssm)].chunk(2, -1)
        y = torch.cat([mixer.act(z0) * x0, y], -1)
    torch.testing.assert_close(mixer.out_proj(y), mixer(hidden), rtol=1e-4, atol=1e-5)
    without = family.project(mixer, hidden, ~mask)  # the module itself takes no mask
    torch.testing.assert_close(without.x, p.x)


def calibration() -> torch.Tensor:
    return tokens(batch=4, length=24)


@each_variant
def test_ghost_is_measured_on_the_inputs_that_the_mixers_get(variant: str) -> None:
    """Replay carries (hidden states, residual) from block to block."""
    model = build(variant)
    ids = calibration()
    scores = sspruner.score(model, "ghost", calibration=calibration()).importance
    for i, (mixer, hidden) in enumerate(zip(mixers(model), mixer_inputs(model, ids), strict=True)):
        family = next(f for f in installed_families().values() if f.recognises(mixer))
        with torch.no_grad():
            p = family.project(mixer, hidden, torch.ones_like(ids, dtype=torch.bool))
            total = (state if isinstance(p, Projected) else selective).ghost_sum(p)
        expected = (total / ids.numel()).sqrt()
        actual = scores[f"backbone.layers.{i}.mixer:state"]
        torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-4, atol=1e-7)


CUTS = [
    ("mamba2-mlp", {"state": 0.5, "head": 0.5, "mlp": 0.25}, {"state": "ghost", "head": "ghost", "mlp": "magnitude"}),
    ("mamba2-mlp-hdim", {"head_dim": 0.5, "mlp": 0.5}, {"head_dim": "ghost", "mlp": "random"}),
    ("mamba2-groups", {"group": 0.5}, "ghost"),
    ("mamba1", {"state": 0.5, "channel": 0.25, "dt_rank": 0.3}, "magnitude"),
    ("mamba1-bias", {"state": 0.5, "channel": 0.5}, "ghost"),
    ("mamba2-no-norm", {"state": 0.5, "head": 0.5}, "random"),
]


@pytest.mark.cover(most=2)
@pytest.mark.parametrize(("variant", "axes", "scorer"), CUTS, ids=[c[0] for c in CUTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prune(variant: str, axes: dict[str, float], scorer: Any, dtype: torch.dtype) -> None:
    model = build(variant, dtype=dtype)
    before = sspruner.trace(model)
    result = sspruner.prune(model, scorer, axis=axes, calibration=calibration())
    after = sspruner.trace(model)
    for name, group in before.groups.items():
        if group.axis in axes and name in after.groups:
            assert after.groups[name].units < group.units
    proved = result.report.proof
    assert before.parameters - after.parameters == proved.parameters_removed > 0
    assert before.state_bytes - after.state_bytes == proved.state_bytes_removed
    assert proved.error <= proved.tolerance
    assert result.report.dense["perplexity"] > 1


def test_layers_are_scored_on_inputs_from_the_cut_ones_before_them() -> None:
    model = build("mamba2")
    data = sspruner.calibration(calibration(), model)
    dense = sspruner.score(copy.deepcopy(model), "ghost", calibration=data).importance
    cut = sspruner.prune(model, "ghost", sparsity=0.5, calibration=data).scores.importance
    first, second = (f"backbone.layers.{i}.mixer:state" for i in range(2))
    torch.testing.assert_close(cut[first], dense[first])
    assert not torch.allclose(cut[second], dense[second], rtol=1e-3)


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    ids = calibration()
    ids[0, 0] = 99
    with pytest.raises(sspruner.InputError, match="token id 99 outside the vocabulary"):
        sspruner.score(build("mamba2"), "ghost", calibration=ids)


# The stand-ins against transformers


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"groups": 1, "bias": False, "conv_bias": False}], ids=["rich", "plain"])
def test_the_stand_in_for_mamba2_computes_what_transformers_computes(options: dict[str, Any]) -> None:
    config = zoo("mamba2", **options).config
    theirs = zoo("mamba2", **options).backbone.layers[0].mixer
    ours = Mamba2(
        config.hidden_size,
        d_state=config.state_size,
        d_conv=config.conv_kernel,
        headdim=config.head_dim,
        ngroups=config.n_groups,
        dt_limit=tuple(config.time_step_limit),
        bias=config.use_bias,
        conv_bias=config.use_conv_bias,
    )
    ours.load_state_dict(theirs.state_dict())
    ours.norm.eps = theirs.norm.variance_epsilon
    hidden = torch.randn(2, 19, config.hidden_size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(hidden), theirs(hidden), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"bias": False, "conv_bias": False}], ids=["rich", "plain"])
def test_the_stand_in_for_mamba_computes_what_transformers_computes(options: dict[str, Any]) -> None:
    config = zoo("mamba", **options).config
    theirs = zoo("mamba", **options).backbone.layers[0].mixer
    ours = Mamba(
        config.hidden_size,
        d_state=config.state_size,
        d_conv=config.conv_kernel,
        dt_rank=config.time_step_rank,
        bias=config.use_bias,
        conv_bias=config.use_conv_bias,
    )
    ours.load_state_dict(theirs.state_dict())
    hidden = torch.randn(2, 19, config.hidden_size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(hidden), theirs(hidden), rtol=1e-4, atol=1e-5)


# The package itself


@pytest.mark.parametrize(
    ("ssm_cfg", "axes"),
    [
        ({"layer": "Mamba2", "d_state": 32, "headdim": 16, "ngroups": 2}, ["state", "head"]),
        ({"layer": "Mamba2", "d_state": 32, "headdim": 16, "d_ssm": 64}, ["state", "mlp"]),
        ({"layer": "Mamba1", "d_state": 16}, ["state", "channel"]),
    ],
    ids=["Mamba2", "Mamba2-mlp", "Mamba1"],
)
def test_the_modules_of_mamba_ssm_itself(ssm_cfg: dict[str, Any], axes: list[str]) -> None:
    pytest.importorskip("mamba_ssm", reason="mamba_ssm is not installed: it needs a GPU and its own build")
    if not torch.cuda.is_available():
        pytest.skip("the kernels of mamba_ssm need a GPU")
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel as Real

    config = MambaConfig(d_model=64, n_layer=2, vocab_size=64, ssm_cfg=ssm_cfg, fused_add_norm=False)
    torch.manual_seed(0)
    model = Real(config, device="cuda", dtype=torch.float32).eval()
    ids = tokens(length=32).cuda()
    plan = random_plan(sspruner.trace(model), axes)
    masked = sspruner.apply(copy.deepcopy(model), plan, mode="mask")
    expected = logits(masked, ids)
    sliced = sspruner.apply(model, plan)
    assert (logits(sliced, ids) - expected).abs().max() <= 1e-3 * expected.abs().max()
    assert sspruner.trace(sliced).state_bytes < sspruner.trace(masked).state_bytes
    sspruner.score(sliced, "ghost", calibration=tokens(batch=4, length=32))
