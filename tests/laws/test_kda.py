"""Families with a decay per key channel: what reaches the scan, key and value channels cut apart, config."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

import sspruner
from sspruner.graph.known import installed_families
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Selection
from sspruner.runtime.kda_forward import _kda_forward, is_fitted
from sspruner.surgery.proof import slice_with_proof
from support import kda_state
from support.family_plans import KDA, draw_plan, few, logits
from support.tiny import tokens
from support.zoo import zoo, zoo_models
from support.zoo_variants import cached

INSIDE = ("state", "head", "head_dim")
GATES = [
    *((family, {}) for family in KDA),
    ("bailing_hybrid", {"kda_safe_gate": False}),
    ("glm5_next_text", {"linear_lower_bound": None}),
]
each_kda = pytest.mark.parametrize("family", KDA)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def mixers_of(model: nn.Module) -> list[Any]:
    return [model.get_submodule(site.path) for site in sspruner.trace(model).layers]


def hidden_for(mixer: Any) -> torch.Tensor:
    """fp32 (2, 70, hidden size): more than one chunk of the stock kernel."""
    return torch.randn(2, 70, mixer.q_proj.in_features, generator=torch.Generator().manual_seed(3))


def first(graph: sspruner.SSMGraph, sizes: dict[str, int]) -> Plan:
    """A plan that keeps the last units of some axes, in every layer."""
    groups = {n: g for n, g in graph.groups.items() if g.axis in sizes}
    return Plan({
        n: Selection(g.units, (tuple(range(g.units - sizes[g.axis], g.units)),) * g.groups) for n, g in groups.items()
    })  # fmt: skip


def cut(model: Any, **sizes: int) -> Any:
    graph = sspruner.trace(model)
    slice_with_proof(model, first(graph, sizes), graph)
    return model


@pytest.mark.parametrize(("family", "how"), GATES)
@few(3)
@given(st.data())
def test_project_is_what_reaches_the_scan(family: str, how: dict[str, Any], data: st.DataObject) -> None:
    """Project -> the step recurrence in fp64 -> norm and gate -> o_proj is the mixer's output, cut or not."""
    described, model = installed_families()[family], zoo(family, seed=data.draw(st.integers(0, 99)), **how)
    graph = sspruner.trace(model)
    if data.draw(st.booleans(), "cut"):
        slice_with_proof(model, draw_plan(data, graph, INSIDE), graph)
    for mixer in mixers_of(model):
        hidden = hidden_for(mixer)
        p = described.project(mixer, hidden, torch.ones(hidden.shape[:2], dtype=torch.bool))
        y = kda_state.output(p)
        eps, weight = mixer.o_norm.variance_epsilon, mixer.o_norm.weight.double()
        normed = y / (y.square().mean(-1, keepdim=True) + eps).sqrt() * weight
        expected = (normed.flatten(2) * p.z.double().sigmoid()) @ mixer.o_proj.weight.double().T
        assert_close(mixer(hidden), expected)
        read = described.readout(mixer, y.float(), p.z)
        assert_close(read @ mixer.o_proj.weight.T, expected)


@each_kda
def test_states_are_remembered_in_the_models_of_these_tests(family: str) -> None:
    """Else nothing here would see the recurrence: a token changes outputs 20 tokens later."""
    mixer = mixers_of(zoo(family))[0]
    hidden = hidden_for(mixer)
    changed = hidden.clone()
    changed[:, 5] += 1
    assert (mixer(changed) - mixer(hidden))[:, 25].abs().max() > 1e-3 * mixer(hidden).abs().max()


@each_kda
def test_the_replaced_forward_is_stock_where_nothing_is_cut(family: str) -> None:
    """To the bit: one forward, a prefill and steps."""
    model, ids = zoo(family), tokens()
    expected = logits(model, ids), cached(model, ids, [9] + [1] * 10)
    for mixer in mixers_of(model):
        mixer.forward = lambda *args, own=mixer, **kwargs: _kda_forward(own, *args, **kwargs)
    assert torch.equal(logits(model, ids), expected[0])
    assert torch.equal(cached(model, ids, [9] + [1] * 10), expected[1])


@each_kda
@pytest.mark.parametrize("sizes", [{"state": 2}, {"head_dim": 3}, {"state": 3, "head_dim": 2, "head": 1}], ids=str)
def test_key_and_value_channels_cut_apart_decode_and_load(family: str, sizes: dict[str, int], tmp_path: Any) -> None:
    """The stock classes have one number for both: the forward is replaced, in memory and when the folder is loaded."""
    model, ids = cut(zoo(family), **sizes), tokens()
    assert all(is_fitted(mixer) for mixer in mixers_of(model))
    assert_close(cached(model, ids, [9] + [1] * 10), logits(model, ids))
    assert_close(cached(model, ids, [8, 5, 6]), logits(model, ids))
    sspruner.save(model, tmp_path / "cut")
    loaded = copy.deepcopy(sspruner.load(tmp_path / "cut")[0])
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(loaded.generate(ids, **how), model.generate(ids, use_cache=False, **how))
    with pytest.raises(sspruner.ModelError, match=r"hf cannot express this cut: .*proj.weight is"):
        sspruner.export(model, tmp_path / "stock", to="hf")


@each_kda
def test_equal_key_and_value_channels_have_the_stock_forward_again(family: str) -> None:
    model, ids = cut(zoo(family), state=3), tokens()
    before = logits(model, ids)
    cut(model, head_dim=3)
    assert not any(is_fitted(mixer) for mixer in mixers_of(model))
    alike = cut(zoo(family), state=3, head_dim=3)
    assert torch.allclose(logits(model, ids), logits(alike, ids), atol=1e-5)
    assert not torch.allclose(logits(model, ids), before, atol=1e-3)


@each_kda
def test_a_cache_under_another_name_is_refused(family: str) -> None:
    """Swallowed, it would leave decoding without a state."""
    mixer, hidden = mixers_of(cut(zoo(family), state=2))[0], torch.zeros(1, 1, 16)
    cache = zoo(family)(input_ids=tokens(), use_cache=True).past_key_values
    with pytest.raises(TypeError, match="a cache under the name 'memory'"):
        mixer(hidden, memory=cache)


@each_kda
def test_left_padding_changes_nothing(family: str) -> None:
    """Cut apart, too."""
    for model in (zoo(family), cut(zoo(family), state=2)):
        ids = tokens()
        mask = torch.ones(2, 3 + 19, dtype=torch.long)
        mask[:, :3] = 0
        padded = torch.cat([ids.new_zeros(2, 3), ids], 1)
        told = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        assert_close(model(input_ids=padded, use_cache=False, **told).logits[:, 3:], logits(model, ids))


@each_kda
def test_transformers_loads_unequal_heads_with_the_code_beside_them(family: str, tmp_path: Any) -> None:
    model, ids = cut(zoo(family), state=2), tokens()
    sspruner.export(model, tmp_path / "remote", to="hf-remote")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "remote", trust_remote_code=True)
    assert torch.equal(logits(copy.deepcopy(loaded), ids), logits(model, ids))
    assert_close(cached(loaded, ids, [9] + [1] * 10), logits(model, ids))


def test_bailing_writes_linear_head_dim_and_leaves_head_dim_alone(tmp_path: Any) -> None:
    """Its config computes one from the other and then changes its meaning: a saved linear_head_dim wins."""
    model = zoo("bailing_hybrid", channels=8)
    rope = model.config.head_dim
    cut(model, state=4, head_dim=4)
    assert (model.config.linear_head_dim, model.config.head_dim) == (4, rope)
    sspruner.save(model, tmp_path / "cut")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")  # without the folded epsilon, which it cannot hold
    mixer = mixers_of(stock)[0]
    assert (mixer.head_dim, mixer.num_heads) == (4, 2)
    for own in mixers_of(stock):
        own.o_norm.variance_epsilon *= 4
    assert torch.allclose(logits(stock, tokens()), logits(model, tokens()), atol=1e-5)


def test_heads_alone_are_a_stock_config_of_kimi(tmp_path: Any) -> None:
    model = cut(zoo("kimi_linear", heads=3), head=2)
    sspruner.export(model, tmp_path / "stock", to="hf")
    stock = copy.deepcopy(AutoModelForCausalLM.from_pretrained(tmp_path / "stock"))
    assert torch.equal(logits(stock, tokens()), logits(model, tokens()))


def test_a_published_config_of_kimi_does_not_undo_the_cut(tmp_path: Any) -> None:
    """Its table of sizes wins over linear_num_heads when it is read."""
    published = {"head_dim": 6, "num_heads": 3, "short_conv_kernel_size": 4}
    model = zoo("kimi_linear", heads=3, linear_attn_config=published)
    assert model.config.linear_attn_config == published
    cut(model, head=2)
    sspruner.save(model, tmp_path / "cut")
    assert "linear_attn_config" not in json.loads((tmp_path / "cut" / "config.json").read_text())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "cut").config.linear_num_heads == 2
    loaded = copy.deepcopy(sspruner.load(tmp_path / "cut")[0])
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))


@pytest.mark.parametrize("family", KDA[:2])
def test_attention_stays_where_generation_needs_it(family: str) -> None:
    model = zoo(family, layers="MAM")
    ((name, group),) = sspruner.trace(model).on_axis("block").items()
    with pytest.raises(sspruner.PlanError, match="drops every attention layer; one has to stay"):
        sspruner.apply(model, Plan({name: Selection(group.units, ((0, 2),))}))
    cut_model = sspruner.apply(model, Plan({name: Selection(group.units, ((1, 2),))}))
    assert cut_model.config.layer_types == ["full_attention", "linear_attention"]
    assert cut_model.config.mlp_layer_types == ["sparse", "sparse"]
    assert cut_model.generate(tokens(length=4), max_new_tokens=3, do_sample=False).shape[1] == 7


@pytest.mark.parametrize("axis", ["hidden", "block", "mixer"])
def test_what_copies_of_the_residual_stream_forbid_is_refused_by_name(axis: str) -> None:
    with pytest.raises(
        sspruner.InputError, match=r"Glm5NextForConditionalGeneration cannot be cut there: .*several copies"
    ):
        sspruner.prune(zoo("glm5_next_text"), "magnitude", axis=axis, sparsity=0.5, calibration=tokens())


@pytest.mark.parametrize(("axis", "before"), [("mlp", 16), ("attn_head", 4)])
def test_the_vision_part_is_left_alone(axis: str, before: int) -> None:
    """Its MLPs look like those of the language model."""
    groups = sspruner.trace(zoo("glm5_next_text")).on_axis(axis)
    assert all(name.startswith("model.language_model.layers.") for name in groups)
    assert before in {group.units for group in groups.values()}


@each_kda
def test_a_basis_is_refused(family: str) -> None:
    with pytest.raises(sspruner.SSPrunerError, match="the decay differs by key channel"):
        sspruner.prune(zoo(family), "balanced", sparsity=0.5, basis="balanced", calibration=tokens())


@each_kda
@few(3)
@given(st.data())
def test_masked_equals_sliced_on_key_channels(family: str, data: st.DataObject) -> None:
    """With an epsilon that matters, so that a missing fold is seen; sets differ by head and layer."""
    model, ids = data.draw(zoo_models((family,))), tokens()
    for mixer in mixers_of(model):
        mixer.o_norm.variance_epsilon = 0.1
    graph = sspruner.trace(model)
    plan = draw_plan(data, graph, data.draw(st.sampled_from([("state",), ("state", "head_dim")])))
    masked = sspruner.apply(copy.deepcopy(model), plan, mode="mask")
    slice_with_proof(model, plan, graph)
    assert_close(logits(model, ids), logits(masked, ids), 1e-3)


@pytest.mark.parametrize(
    ("scorer", "axis", "options"),
    [
        ("last", "state", {}),
        ("last", "state", {"input": "weights"}),
        ("head-merge", "head", {}),
        ("sparsessm", "state", {}),
    ],
    ids=str,
)
def test_scorers_that_do_not_know_a_delta_rule_say_so(scorer: str, axis: str, options: dict[str, Any]) -> None:
    with pytest.raises(sspruner.InputError, match=f"{scorer}: (not for delta rules|only Mamba1-type mixers)"):
        sspruner.score(zoo("kimi_linear"), scorer, axis=axis, calibration=tokens(), options=options)


@each_kda
def test_a_model_on_disk_is_cut_as_one_in_memory(family: str, tmp_path: Any) -> None:
    """Key channels go block by block: the forward of each mixer is replaced there, too."""
    sspruner.save(zoo(family), tmp_path / "dense")
    data, how = tokens(4, 20), {"axis": {"state": 0.5, "head": 0.5}}
    memory = sspruner.load(tmp_path / "dense")[0]
    plan = sspruner.prune(memory, "ghost", calibration=data, **how).plan
    apart, _ = sspruner.load(tmp_path / "dense", offload=tmp_path / "work")
    assert sspruner.prune(apart, "ghost", calibration=data, **how).plan.groups == plan.groups
    sspruner.save(apart, tmp_path / "cut")
    assert_close(logits(sspruner.load(tmp_path / "cut")[0], data), logits(memory, data))
