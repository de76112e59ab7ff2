"""One plan, two modes: masked = sliced, and every way of breaking a cut is caught."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import close, logits, models, plans, selections, tiny_model, tokens

import sspruner
from sspruner.planning.plan import Plan, Selection
from sspruner.surgery import proof
from sspruner.surgery import slice as slicing
from sspruner.surgery.mask import mask


@given(st.data())
def test_masked_equals_sliced(data: st.DataObject) -> None:
    model = data.draw(models())
    plan = data.draw(plans(sspruner.trace(model)))
    ids = tokens()
    masked = sspruner.apply(copy.deepcopy(model), plan, mode="mask").float()  # exact: fp32 holds every bf16
    sliced = sspruner.apply(model, plan, mode="slice").float()
    close(logits(sliced, ids), logits(masked, ids), masked, ids)


@given(st.data())
def test_unmask_restores_the_original_bits(data: st.DataObject) -> None:
    model = data.draw(models())
    before = {name: p.clone() for name, p in model.named_parameters()}
    plan = data.draw(plans(sspruner.trace(model)))
    sspruner.apply(model, plan, mode="mask")
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert bool(changed) == any(s.after < s.before for s in plan.groups.values())
    sspruner.unmask(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@given(st.data())
def test_slicing_twice_is_slicing_once_with_composed_indices(data: st.DataObject) -> None:
    once = data.draw(models(dtypes=(torch.float32,)))
    twice = copy.deepcopy(once)
    first = data.draw(plans(sspruner.trace(once)))
    sspruner.apply(twice, first)
    second = data.draw(plans(sspruner.trace(twice)))
    sspruner.apply(twice, second)
    composed = {
        name: first.groups[name].then(second.groups[name])
        if name in first.groups and name in second.groups
        else first.groups.get(name) or second.groups[name]
        for name in {**first.groups, **second.groups}
    }
    sspruner.apply(once, Plan("state", composed))
    for name, parameter in once.named_parameters():
        assert torch.equal(parameter, twice.get_parameter(name)), name
    assert once.config.sspruner["groups"] == twice.config.sspruner["groups"]
    assert once.config.state_size == twice.config.state_size


@given(models())
def test_keeping_everything_is_the_identity(model: torch.nn.Module) -> None:
    expected = logits(model, tokens())
    parameters = {n: p.clone() for n, p in model.named_parameters()}
    groups = sspruner.trace(model).on_axis("state")
    everything = {n: Selection(g.units, (tuple(range(g.units)),) * g.groups) for n, g in groups.items()}
    sspruner.apply(model, Plan("state", everything))
    assert all(torch.equal(p, parameters[n]) for n, p in model.named_parameters())
    assert torch.equal(logits(model, tokens()), expected)


@given(st.data())
def test_parameters_and_state_bytes_shrink_as_predicted(data: st.DataObject) -> None:
    """Predicted by the graph, counted in the model, and measured in the cache that the model allocates."""
    model = data.draw(models())
    graph = sspruner.trace(model)
    plan = data.draw(plans(graph))
    state = sum(
        4
        * m.num_heads
        * m.head_dim
        * (plan.groups[f"{p}:state"].after if f"{p}:state" in plan.groups else m.ssm_state_size)
        for p, m in ((layer.path, model.get_submodule(layer.path)) for layer in graph.layers)
    )
    sspruner.apply(model, plan)
    assert proof.measured_state_bytes(model, tokens()) == state == sspruner.trace(model).state_bytes
    assert sspruner.trace(model).parameters == sum(p.numel() for p in model.parameters())


@given(st.data())
def test_uneven_layers_run_forward_backward_and_generate(data: st.DataObject) -> None:
    """Gradients flow, and greedy and beam search give the same with and without a cache."""
    model = data.draw(models(dtypes=(torch.float32,)))
    groups = sspruner.trace(model).on_axis("state")
    sspruner.apply(model, Plan("state", {n: data.draw(selections(g.groups, g.units)) for n, g in groups.items()}))
    ids = tokens(2, 9)
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    model.eval()
    for beams in (1, 2):
        args = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
        attention = torch.ones_like(ids)
        cached = model.generate(ids, attention_mask=attention, use_cache=True, **args)
        fresh = model.generate(ids, attention_mask=attention, use_cache=False, **args)
        assert torch.equal(cached, fresh)


@given(models(dtypes=(torch.float32,)), st.integers(0, 2**16))
def test_decoding_step_by_step_equals_one_forward(model: torch.nn.Module, seed: int) -> None:
    """The recurrent path of a sliced model: prefill, then one token at a time."""
    groups = sspruner.trace(model).on_axis("state")
    keep = {n: Selection(g.units, (tuple(range(0, g.units, 2)),) * g.groups) for n, g in groups.items()}
    sspruner.apply(model, Plan("state", keep))
    ids = tokens(2, 12, seed)
    with torch.no_grad():
        out = model(input_ids=ids[:, :8], use_cache=True)
        for t in range(8, 12):
            out = model(input_ids=ids[:, t : t + 1], cache_params=out.cache_params, use_cache=True)
    close(out.logits[:, -1], logits(model, ids)[:, -1], model, ids)


def test_tied_head_stays_tied() -> None:
    model = tiny_model(tied=True)
    sspruner.apply(model, Plan("state", {"backbone.layers.0.mixer:state": Selection(6, ((0, 3),))}))
    assert model.lm_head.weight is model.backbone.embeddings.weight


def half_plan(model: torch.nn.Module) -> Plan:
    groups = sspruner.trace(model).on_axis("state")
    return Plan("state", {n: Selection(6, ((0, 2, 5),) * g.groups) for n, g in groups.items()})


def wrong_index(monkeypatch: pytest.MonkeyPatch) -> None:
    right = slicing.dropped_rows
    monkeypatch.setattr(slicing, "dropped_rows", lambda m, s: right(m, s) - int(m.rows == "C"))


def forgotten_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    right = slicing._drop

    def drop(model: torch.nn.Module, name: str, dim: int, rows: torch.Tensor) -> None:
        if name.endswith("conv1d.bias"):  # right size, wrong rows: silu(bias) is not 0
            bias = model.get_parameter(name)
            bias.data = bias.data.roll(1)
        right(model, name, dim, rows)

    monkeypatch.setattr(slicing, "_drop", drop)


def broken_value(monkeypatch: pytest.MonkeyPatch) -> None:
    right = slicing._drop

    def drop(model: torch.nn.Module, name: str, dim: int, rows: torch.Tensor) -> None:
        right(model, name, dim, rows)
        model.get_parameter(name).data[0] = float("nan")

    monkeypatch.setattr(slicing, "_drop", drop)


@pytest.mark.parametrize("fault", [wrong_index, forgotten_bias, broken_value])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_proof_catches_a_wrong_cut(fault, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(groups=2, dtype=dtype)
    plan = half_plan(model)
    fault(monkeypatch)
    with pytest.raises(sspruner.ProofError, match="logits differ"):
        sspruner.apply(model, plan)


@pytest.mark.parametrize("what", ["parameters", "state bytes"])
def test_the_proof_catches_a_wrong_prediction(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    graph = sspruner.trace(model)
    counter = "_parameters" if what == "parameters" else "measured_state_bytes"
    right = getattr(proof, counter)
    calls: list[int] = []

    def wrong(*args: object) -> int:
        calls.append(1)
        return right(*args) + 4 * (len(calls) - 1)  # as if a little less had gone

    monkeypatch.setattr(proof, counter, wrong)
    with pytest.raises(sspruner.ProofError, match=f"{what}.*the plan predicts"):
        proof.slice_with_proof(model, half_plan(model), graph)


def test_proof_leaves_dtype_and_bits_alone() -> None:
    """The comparison runs in fp32; what stays of a bf16 model is bit for bit what was there."""
    model = tiny_model(dtype=torch.bfloat16)
    before = model.backbone.layers[1].mixer.in_proj.weight.clone()
    sspruner.apply(model, half_plan(model))
    after = model.backbone.layers[1].mixer.in_proj.weight
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    D = model.backbone.layers[1].mixer.intermediate_size
    B = before[2 * D : 2 * D + 6]
    assert torch.equal(after[2 * D : 2 * D + 3], B[[0, 2, 5]])


def test_masking_a_masked_model_is_refused() -> None:
    model = tiny_model()
    plan = half_plan(model)
    sspruner.apply(model, plan, mode="mask")
    for again in (
        lambda: sspruner.apply(model, plan, mode="mask"),
        lambda: sspruner.apply(model, plan),
        lambda: mask(model, plan, sspruner.trace(model)),
        lambda: sspruner.prune(model, "random", calibration=tokens(4, 8)),
    ):
        with pytest.raises(sspruner.PlanError, match=r"masked.*unmask"):
            again()


def test_unknown_mode() -> None:
    model = tiny_model()
    with pytest.raises(sspruner.InputError, match="mode 'cut': must be slice or mask"):
        sspruner.apply(model, half_plan(model), mode="cut")


@given(st.data())
def test_masked_is_a_context(data: st.DataObject) -> None:
    """Inside it the states are silent, outside the model is as it was, also after an error."""
    model = data.draw(models(dtypes=(torch.float32,)))
    graph = sspruner.trace(model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="inside"), sspruner.masked(model, data.draw(plans(graph)), graph):
        raise RuntimeError("inside")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
