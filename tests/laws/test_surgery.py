"""One plan, two modes: masked = sliced, on every axis and on several at once, and every broken cut is caught."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner.axes import axis_of
from sspruner.graph.group import BARRED
from sspruner.graph.layout import Layout
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Selection
from sspruner.surgery import proof
from sspruner.surgery import slice as slicing
from sspruner.surgery.mask import mask
from sspruner.surgery.predict import removed_state_bytes
from sspruner.surgery.proof import measured_state_bytes
from sspruner.surgery.record import fields
from sspruner.surgery.slice import slice_model
from support.examples import examples
from support.family_plans import AXES
from support.tensors import same, tensors
from support.tiny import close, everything, half, logits, models, plans, tiny_model, tokens
from support.zoo import FAMILIES, zoo, zoo_models
from support.zoo_variants import cached, sharing

FP32 = (torch.float32,)
UNFOLDED = ("state", "group", "block")  # in Mamba2: no norm runs over these units, so nothing that stays is rounded


def same_fields(a: dict, b: dict) -> bool:
    """Equal configs; an epsilon that was scaled twice may differ in its last digit."""
    close = {k for k in a if isinstance(a[k], float) and math.isclose(a[k], b[k], rel_tol=1e-12)}
    return a.keys() == b.keys() and all(a[k] == b[k] for k in a.keys() - close)


@given(st.data())
def test_masked_equals_sliced(data: st.DataObject) -> None:
    """Several axes in one plan; in bf16 those without a fold, which are exact there, too."""
    model = data.draw(models(least_state=2))
    axes = () if model.dtype == torch.float32 else UNFOLDED
    plan = data.draw(plans(sspruner.trace(model), axes))
    ids = tokens()
    masked = sspruner.apply(copy.deepcopy(model), plan, mode="mask").float()  # exact: fp32 holds every bf16
    sliced = sspruner.apply(model, plan, mode="slice").float()
    close(logits(sliced, ids), logits(masked, ids), masked, ids)


@pytest.mark.parametrize(("family", "axis"), [("bamba", "mixer"), ("zamba2", "block"), ("mamba", "block")])
def test_what_is_dropped_takes_its_state_with_it(family: str, axis: str) -> None:
    """The bytes in the model's own cache, before and after; the proof compares them with what the plan predicts."""
    model = zoo(family)
    before, plan = measured_state_bytes(model, tokens()), half_plan(model, axis)
    predicted = removed_state_bytes(plan, sspruner.trace(model))
    sspruner.apply(model, plan)
    assert 0 < before - measured_state_bytes(model, tokens()) == predicted


@examples(25)
@given(zoo_models(), st.sampled_from([torch.float32, torch.bfloat16]), st.data())
def test_unmask_restores_the_original_bits(model: torch.nn.Module, dtype: torch.dtype, data: st.DataObject) -> None:
    """In every family, on every axis, buffers and shared parameters too."""
    before = tensors(model.to(dtype))
    shared = sharing(model)
    graph = sspruner.trace(model)
    plan = data.draw(plans(graph))
    sspruner.apply(model, plan, mode="mask")
    masked = tensors(model)
    assert not same(masked, before)
    for name, selection in plan.groups.items():
        group = graph.groups[name]
        for unit in range(group.units):  # every unit that goes is silent somewhere that it alone owns
            gone = [g for g in range(group.groups) if unit in selection.dropped(g)]
            writers = group.blocks[unit].writers if gone and group.blocks else ()
            assert all(not masked[writer].any() for writer in writers)
            for member in group.members:
                silent = member.gather(masked[member.tensor])[gone, unit]
                assert (silent == (-torch.inf if member.mask == BARRED else 0)).all()
    sspruner.unmask(model)
    assert same(tensors(model), before)
    assert sharing(model) == shared


def composed(first: Plan, second: Plan) -> Plan:
    """The one cut that does what two successive ones do; for axes that are not nested in one cut before."""
    groups = dict(first.groups)
    for name, after in second.groups.items():
        if name in groups:
            keeps = zip(groups[name].keep, after.keep, strict=True)
            after = Selection(groups[name].before, tuple(tuple(one[i] for i in two) for one, two in keeps))
        groups[name] = after
    return Plan(groups)


@pytest.mark.slow
@examples(25)
@given(zoo_models(), st.data())
def test_slicing_twice_is_slicing_once_with_composed_indices(once: torch.nn.Module, data: st.DataObject) -> None:
    """Bit for bit, up to the rounding of a product where a fold scales what stays; the config says the same of both."""
    twice = copy.deepcopy(once)
    graph = sspruner.trace(once)
    first = data.draw(plans(graph, tuple(a for a in graph.axes if a != "block")))
    sspruner.apply(twice, first)
    again = sspruner.trace(twice)
    nested = {f"{site.path}:{axis}" for site in graph.sites for axis, outer in site.layout.axes.items()
              if any(f"{site.path}:{other}" in first.groups for other in outer)}  # fmt: skip
    free = tuple(axis for axis in again.axes if axis != "block" and not any(axis_of(n) == axis for n in nested))
    second = data.draw(plans(again, free))
    sspruner.apply(twice, second)
    sspruner.apply(once, composed(first, second))

    folded = {f"{path}.{fold.target}" for s in graph.sites for path in (s.path, *s.aliases) for fold in s.layout.folds}
    result = tensors(twice)
    for name, tensor in tensors(once).items():
        torch.testing.assert_close(result[name], tensor, rtol=1e-6 * (name in folded), atol=0)
    assert sharing(twice) == sharing(once)
    assert same_fields(fields(twice.config), fields(once.config))
    close(logits(twice, tokens()), logits(once, tokens()), once, tokens())
    record, direct = twice.config.sspruner, once.config.sspruner
    assert record["cuts"] == [Plan(first.groups).to_json(), Plan(second.groups).to_json()]
    assert direct["cuts"] == [composed(first, second).to_json()]
    assert record["stock"] == direct["stock"]


@pytest.mark.slow
@pytest.mark.cover
@pytest.mark.parametrize("family", [f for f in FAMILIES if "block" in AXES[f]])
def test_dropping_blocks_twice_is_dropping_them_once(family: str) -> None:
    """The first block, then the last: the second cut counts the blocks that the first has left."""
    once = zoo(family)
    twice = copy.deepcopy(once)
    ((name, group),) = sspruner.trace(once).on_axis("block").items()
    first = Plan({name: Selection(group.units, (tuple(range(1, group.units)),))})
    second = Plan({name: Selection(group.units - 1, (tuple(range(group.units - 2)),))})
    sspruner.apply(sspruner.apply(twice, first), second)
    sspruner.apply(once, composed(first, second))
    assert same(tensors(twice), tensors(once))
    assert sharing(twice) == sharing(once)
    assert same_fields(fields(twice.config), fields(once.config))
    assert torch.equal(logits(twice, tokens()), logits(once, tokens()))
    assert len(dict(once.named_modules())[name.removesuffix(":block")]) == group.units - 2


@examples(25)
@given(zoo_models(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_keeping_everything_is_the_identity(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Below `apply`, which refuses such a plan: on all axes at once, no bit and no field of the config changes."""
    expected = logits(model.to(dtype), tokens())
    before, shared, config = tensors(model), sharing(model), fields(model.config)
    graph = sspruner.trace(model)
    plan = everything(graph)
    with pytest.raises(sspruner.PlanError, match="keeps every unit"):
        sspruner.apply(model, plan)
    slice_model(model, plan, graph)
    assert same(tensors(model), before)
    assert sharing(model) == shared
    assert fields(model.config) == config
    assert torch.equal(logits(model, tokens()), expected)
    assert str(sspruner.trace(model)) == str(graph)


@pytest.mark.slow
@examples(25)
@given(zoo_models(), st.data())
def test_parameters_and_state_bytes_shrink_as_predicted(model: torch.nn.Module, data: st.DataObject) -> None:
    """Predicted by the graph, counted in the model, and measured in the cache that the model allocates."""
    graph = sspruner.trace(model)
    plan = data.draw(plans(graph))
    predicted = proof.removed_parameters(model, plan, graph), proof.removed_state_bytes(plan, graph)
    sspruner.apply(model, plan)
    parameters = sum(p.numel() for p in model.parameters())
    assert graph.parameters - predicted[0] == parameters == sspruner.trace(model).parameters
    assert parameters < graph.parameters
    measured = proof.measured_state_bytes(model, tokens())
    assert graph.state_bytes - predicted[1] == measured == sspruner.trace(model).state_bytes


def without_gradient(model: torch.nn.Module, ids: torch.Tensor) -> set[str]:
    """The parameters that a training step does not reach: none, but for adapters in an untied zamba2."""
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    model.eval()
    unused = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    untied = model.config.model_type == "zamba2" and not model.config.tie_word_embeddings
    assert untied or not unused
    return unused


@examples(15)
@given(zoo_models(), st.data())
def test_uneven_layers_run_forward_backward_and_generate(model: torch.nn.Module, data: st.DataObject) -> None:
    """Gradients flow, and greedy and beam search give the same with and without a cache."""
    ids = tokens(2, 9)
    unused = without_gradient(model, ids)
    plan = data.draw(plans(sspruner.trace(model), most=8))
    sspruner.apply(model, plan)
    still = without_gradient(model, ids)
    assert len(still) <= len(unused) if "block" in plan.axes else still == unused  # blocks are renumbered
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    for beams in (1, 2):
        args = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
        attention = torch.ones_like(ids)
        with_cache = model.generate(ids, attention_mask=attention, use_cache=True, **args)
        fresh = model.generate(ids, attention_mask=attention, use_cache=False, **args)
        assert torch.equal(with_cache, fresh)


@pytest.mark.parametrize("name", ["bamba", "granitemoehybrid", "jamba", "falcon_h1"])
def test_the_norm_before_a_dropped_mixer_still_gets_a_gradient(name: str) -> None:
    model = zoo(name)
    ids = tokens(2, 9)
    without_gradient(model, ids)
    sspruner.apply(model, half(sspruner.trace(model), "mixer"))
    model.zero_grad(set_to_none=True)
    without_gradient(model, ids)


@examples(25)
@given(zoo_models(), st.data(), st.integers(0, 2**16))
def test_decoding_step_by_step_equals_one_forward(model: torch.nn.Module, data: st.DataObject, seed: int) -> None:
    """The recurrent path of a sliced model: prefill, then one token at a time."""
    sspruner.apply(model, data.draw(plans(sspruner.trace(model), most=8)))
    ids = tokens(2, 12, seed)
    with torch.no_grad():
        steps = cached(model, ids, [8, 1, 1, 1, 1])
    close(steps, logits(model, ids), model, ids)


@pytest.mark.parametrize("axis", ["state", "hidden"])
def test_tied_head_stays_tied(axis: str) -> None:
    model = tiny_model(tied=True)
    sspruner.apply(model, half(sspruner.trace(model), axis))
    assert model.lm_head.weight is model.backbone.embeddings.weight


def half_plan(model: torch.nn.Module, axis: str = "state") -> Plan:
    return half(sspruner.trace(model), axis)


def wrong_index(monkeypatch: pytest.MonkeyPatch) -> None:
    right = slicing.dropped_rows
    monkeypatch.setattr(slicing, "dropped_rows", lambda m, s: right(m, s) - int(m.rows in ("C", "y")))


def around_drop(monkeypatch: pytest.MonkeyPatch, before=lambda tensor: None, after=lambda tensor: None) -> None:
    """Do something to every tensor just before, or just after, rows leave it."""
    right = slicing.without_rows

    def without(tensor: torch.Tensor, cuts: slicing.Cuts) -> torch.Tensor:
        before(tensor)
        kept = right(tensor, cuts)
        after(kept)
        return kept

    monkeypatch.setattr(slicing, "without_rows", without)


def forgotten_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right size, wrong rows in every vector, the conv's bias among them: silu(bias) is not 0."""
    around_drop(monkeypatch, before=lambda tensor: tensor.copy_(tensor.roll(1)) if tensor.ndim == 1 else None)


def broken_value(monkeypatch: pytest.MonkeyPatch) -> None:
    around_drop(monkeypatch, after=lambda tensor: tensor[0].fill_(float("nan")))


@pytest.mark.parametrize("fault", [wrong_index, forgotten_bias, broken_value])
@pytest.mark.parametrize("axis", ["state", "head", "head_dim"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_proof_catches_a_wrong_cut(fault, axis: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(groups=2, dtype=dtype)
    plan = half_plan(model, axis)
    fault(monkeypatch)
    with pytest.raises(sspruner.ProofError, match="logits differ"):
        sspruner.apply(model, plan)


@pytest.mark.slow
@pytest.mark.cover(families=1)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_proof_catches_every_forgotten_fold(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fold of each family is needed: without it, on every axis that it is for, sliced is not masked."""
    model = zoo(family, hidden=16)
    for module in model.modules():
        for epsilon in ("variance_epsilon", "eps"):
            if hasattr(module, epsilon):
                setattr(module, epsilon, 0.1)  # so that it matters
    graph = sspruner.trace(model)
    axes = {axis: half(graph, axis) for axis in graph.axes if axis not in ("block", "mixer")}
    cases = {(axis, fold) for axis in axes for site in graph.sites for fold in site.layout.folds if axis in fold.over}
    found = {fold.target for axis, fold in cases if axis == "hidden"}
    epsilon = "eps" if "eps" in found else "variance_epsilon"  # Qwen's name
    assert found == ({"weight", epsilon} if "hidden" in axes else set())
    right = slicing.fold_values
    for axis, forgotten in sorted(cases, key=str):

        def fold(model, site, before: Layout, after: Layout, forgotten=forgotten) -> None:
            kept = tuple(f for f in after.folds if f != forgotten)
            right(model, site, before, replace(after, folds=kept))

        monkeypatch.setattr(slicing, "fold_values", fold)
        with pytest.raises(sspruner.ProofError, match="logits differ"):
            sspruner.apply(copy.deepcopy(model), axes[axis])
        monkeypatch.setattr(slicing, "fold_values", right)
        sspruner.apply(copy.deepcopy(model), axes[axis])


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
    assert torch.equal(after[2 * D : 2 * D + 3], B[[0, 2, 4]])


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


@given(zoo_models(), st.data())
def test_masked_is_a_context(model: torch.nn.Module, data: st.DataObject) -> None:
    """Inside it the units are silent, outside the model is as it was, also after an error."""
    graph, before = sspruner.trace(model), tensors(model)
    plan = data.draw(plans(graph))
    with sspruner.masked(model, plan, graph):
        assert not same(tensors(model), before)
    assert same(tensors(model), before)
    with pytest.raises(RuntimeError, match="inside"), sspruner.masked(model, plan, graph):
        raise RuntimeError("inside")
    assert same(tensors(model), before)
    sspruner.unmask(model)  # nothing is left to undo
    assert same(tensors(model), before)


@pytest.mark.parametrize("mode", ["mask", "slice"])
def test_a_plan_that_removes_nothing_is_refused(mode: str) -> None:
    """Whoever applies it expects a smaller model; an empty plan is such a plan, too."""
    model = tiny_model()
    before = tensors(model)
    for plan in (Plan({}), everything(sspruner.trace(model))):
        with pytest.raises(sspruner.PlanError, match="nothing would be removed"):
            sspruner.apply(model, plan, mode=mode)
    assert same(tensors(model), before)
    assert not hasattr(model.config, "sspruner")
