"""New values of parameters, biases that linear layers get: written, undone, cut along, saved, and never forgotten."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner.io import source as loading
from sspruner.plans.plan import Plan, check_plan
from sspruner.plans.reduction import Selection
from sspruner.surgery import mask as masking
from sspruner.surgery import proof
from sspruner.surgery import tensors as writing
from support.elements import biases_lacking, mixed, new_values, random_like, random_mask
from support.examples import examples
from support.family_plans import AXES
from support.round_trip import check_round_trip
from support.tensors import same, tensors
from support.tiny import close, half, logits, tiny_model, tokens
from support.zoo import FAMILIES, zoo, zoo_models
from support.zoo_variants import sharing

IN0, OUT0 = "backbone.layers.0.mixer.in_proj", "backbone.layers.0.mixer.out_proj"


def out_biases(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A new bias wherever one can be added: what compensation for removed units needs."""
    return {n: random_like(torch.ones(size), i) * 0.3 for i, (n, size) in enumerate(biases_lacking(model).items())}


def switches(model: torch.nn.Module) -> list[bool]:
    return [m.use_bias for m in model.modules() if hasattr(m, "use_bias")]


@examples(25)
@given(zoo_models(), st.sampled_from([torch.float32, torch.bfloat16]), st.data())
def test_unmask_restores_the_original_bits(model: torch.nn.Module, dtype: torch.dtype, data: st.DataObject) -> None:
    """Biases that were added are gone again; where nothing else was masked, the model held the new values."""
    before, shared, switched = tensors(model.to(dtype)), sharing(model), switches(model)
    plan = data.draw(mixed(model, values=True))
    sspruner.apply(model, plan, mode="mask")
    assert set(tensors(model)) >= {*before, *plan.updates}
    assert {p.dtype for p in model.parameters()} == {dtype}
    if not plan.groups and not plan.elements:
        assert all(torch.equal(model.get_parameter(n), v.to(dtype)) for n, v in plan.updates.items())
    sspruner.unmask(model)
    assert same(tensors(model), before)
    assert (sharing(model), switches(model)) == (shared, switched)
    assert not masking.added_biases(model)


@pytest.mark.slow
@examples(25)
@given(zoo_models(), st.data())
def test_masked_equals_sliced(model: torch.nn.Module, data: st.DataObject) -> None:
    """New values, new biases, units of any axis and single elements, in one plan."""
    plan, ids = data.draw(mixed(model, values=True)), tokens()
    added = sum(v.numel() for n, v in plan.updates.items() if n in biases_lacking(model))
    dense = sum(p.numel() for p in model.parameters())
    masked = sspruner.apply(copy.deepcopy(model), plan, mode="mask")
    found = proof.slice_with_proof(model, plan, sspruner.trace(model))
    close(logits(model, ids), logits(masked, ids), masked, ids)
    assert found.parameters_added == added
    assert dense + added - found.parameters_removed == sum(p.numel() for p in model.parameters())


@pytest.mark.ci_cover(most=3)
@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in FAMILIES if "hidden" in AXES[f]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_bias_that_can_be_added(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """All at once with a cut of the hidden size, which they follow; then saved, loaded, cut on every axis, saved."""
    model = zoo(family, bias=False, hidden=16, dtype=dtype)
    updates = out_biases(model)
    assert any(name.endswith((".out_proj.bias", ".o_proj.bias")) for name in updates)
    cut = half(sspruner.trace(model), "hidden")
    sspruner.apply(model, Plan(cut.groups, updates=updates))
    (hidden,) = cut.groups.values()
    for name, value in updates.items():
        bias = model.get_parameter(name)
        assert bias.dtype == dtype
        assert len(bias) in (len(value), hidden.after)
    outs = [m for n, m in model.named_modules() if n.endswith("out_proj") and hasattr(m, "out_features")]
    assert all(len(m.bias) == hidden.after for m in outs)
    assert all(switches(model))
    loaded = check_round_trip(model, tmp_path / "one")
    graph = sspruner.trace(loaded)
    groups = {n: s for axis in graph.axes if axis not in ("block", "mixer") for n, s in half(graph, axis).groups.items()
              if 0 < s.after < s.before}  # fmt: skip
    name, group = next(iter(graph.elements.items()))
    elements = {name: random_mask((group.groups, group.units), 0)}
    changed = {n: random_like(p, 7) for n, p in loaded.named_parameters() if n.endswith("out_proj.bias")}
    sspruner.apply(loaded, Plan(groups, elements=elements, updates=changed))
    again = check_round_trip(loaded, tmp_path / "two")
    assert ["biases" in cut for cut in again.config.sspruner["cuts"]] == [True, False]


@examples(10)
@given(zoo_models(), st.data())
def test_load_gives_back_what_was_saved(model: torch.nn.Module, data: st.DataObject) -> None:
    for _ in range(data.draw(st.integers(1, 2))):
        sspruner.apply(model, data.draw(mixed(model, values=True)))
    with tempfile.TemporaryDirectory() as folder:
        check_round_trip(model, Path(folder) / "model")


@pytest.mark.slow
def test_a_mixer_that_is_cut_and_dropped_by_one_plan_is_loaded_as_it_was(tmp_path: Path) -> None:
    """Falcon-H1 keeps a buffer in its place, which the loader cuts last."""
    model = zoo("falcon_h1")
    graph = sspruner.trace(model)
    name = "model.layers.0.mamba:state"
    sspruner.apply(model, Plan({name: half(graph).groups[name], "model.layers:mixer": Selection(3, ((1, 2),))}))
    check_round_trip(model, tmp_path / "model")


def test_a_shared_layer_gets_one_bias(tmp_path: Path) -> None:
    """Zamba2's blocks, in three layers two of which share: both names are one parameter, also in the file."""
    model = zoo("zamba2", bias=False)
    names = [n for n in out_biases(model) if n.endswith("feed_forward.down_proj.bias")]
    assert len(names) == 2
    shared = sharing(model)
    value = torch.full((len(model.get_parameter(names[0].replace("bias", "weight"))),), 0.5)
    for mode in ("mask", "slice"):
        sspruner.apply(model, Plan(half(sspruner.trace(model)).groups, updates={names[0]: value}), mode=mode)
        (group,) = sharing(model) - shared
        assert {n.endswith("feed_forward.down_proj.bias") for n in group} == {True}
        assert len(group) == 2
        if mode == "mask":
            sspruner.unmask(model)
            assert sharing(model) == shared
    check_round_trip(model, tmp_path / "model")


def test_a_new_bias_takes_the_weights_out_of_reach_of_stock_classes(tmp_path: Path) -> None:
    """They would drop it with a warning; alone, beside a stock cut, and in a masked model."""
    from transformers import AutoModelForCausalLM

    for number, (units, mode) in enumerate([(False, "slice"), (True, "slice"), (True, "mask")]):
        model = tiny_model()
        graph = sspruner.trace(model)
        elements = {f"{OUT0}:weight": random_mask((4, 8), 0)}
        plan = Plan(half(graph).groups if units else {}, elements=elements, updates={f"{OUT0}.bias": torch.ones(4)})
        sspruner.apply(model, plan, mode=mode)
        folder = sspruner.save(model, tmp_path / str(number))
        assert hasattr(model.config, "sspruner") == (mode == "slice")
        with pytest.raises(OSError, match=r"no file named model.safetensors"):
            AutoModelForCausalLM.from_pretrained(folder)
        loaded, _ = sspruner.load(folder)
        assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))
        (cut,) = json.loads((folder / "config.json").read_text())["sspruner"]["cuts"]
        assert cut["biases"] == [f"{OUT0}.bias"]


def test_new_values_alone_do_not_touch_the_config(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model(bias=True)
    before = copy.deepcopy(vars(model.config))
    updates = {name: random_like(p, 0) for name, p in model.named_parameters()}
    sspruner.apply(model, Plan({}, elements={f"{IN0}:weight": random_mask((30, 4), 0)}, updates=updates))
    assert vars(model.config) == before
    stock = AutoModelForCausalLM.from_pretrained(sspruner.save(model, tmp_path / "model"))
    assert torch.equal(logits(stock, tokens()), logits(model, tokens()))
    assert torch.equal(stock.get_parameter(f"{OUT0}.bias"), updates[f"{OUT0}.bias"])


def test_a_masked_model_that_was_cut_before_is_saved_with_its_new_biases(tmp_path: Path) -> None:
    model = tiny_model()
    sspruner.apply(model, half(sspruner.trace(model)))
    record = copy.deepcopy(model.config.sspruner)
    masking.update_tensors(model, {f"{OUT0}.bias": torch.ones(4)})
    loaded, _ = sspruner.load(sspruner.save(model, tmp_path / "model"))
    assert model.config.sspruner == record
    assert len(loaded.config.sspruner["cuts"]) == 2
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))


@examples(15)
@given(zoo_models(), st.data())
def test_piece_by_piece_is_all_at_once(model: torch.nn.Module, data: st.DataObject) -> None:
    """What a walk over the layers does, later values over earlier ones: undone to the bit, whatever the order."""
    before, plan = tensors(model), data.draw(mixed(model, values=True))
    masked = tensors(sspruner.apply(copy.deepcopy(model), plan, mode="mask"))
    masking.update_tensors(model, {n: v * 2 for n, v in plan.updates.items()})
    assert set(masking.added_biases(model)) == set(tensors(model)) & set(plan.updates) - set(before)
    assert not masking.update_tensors(model, plan.updates)  # the biases are there now
    graph = sspruner.trace(model)
    for name, keep in plan.elements.items():
        masking.mask_elements(model, graph.elements[name], keep)
    for name, selection in plan.groups.items():
        masking.mask_group(model, graph.groups[name], selection)
    assert same(tensors(model), masked)
    masking.update_tensors(model, data.draw(new_values(model)))
    sspruner.unmask(model)
    assert same(tensors(model), before)


WRONG = {
    "no_such.weight": (torch.ones(3), "the model has no such parameter; the nearest is"),
    "backbone.layers.0.mixer.inproj.bias": (torch.ones(30), "nearest is backbone.layers.0.mixer.in_proj.weight"),
    "backbone.norm_f.bias": (torch.ones(4), "the model has no such parameter"),
    "lm_head.bias": (torch.ones(31), "no such bias, and none can be added there"),
    f"{IN0}.weight": (torch.ones(4, 30), r"its new value is \(4, 30\), the parameter \(30, 4\)"),
    f"{IN0}.bias": (torch.ones(29), r"its new value is \(29,\), the parameter \(30,\)"),
    f"{OUT0}.bias": (torch.tensor([0, 1, 2, torch.nan]), "not finite in float32"),
    f"{OUT0}.weight": (torch.ones(4, 8, dtype=torch.int64), "not finite in float32"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("mode", ["mask", "slice"])
def test_values_that_do_not_fit_are_refused(name: str, mode: str) -> None:
    model = tiny_model()
    before, plan = tensors(model), half(sspruner.trace(model))
    value, message = WRONG[name]
    updates = {f"{IN0}.bias": torch.ones(30), name: value}
    with pytest.raises(sspruner.PlanError, match=message) as caught:
        sspruner.apply(model, Plan(plan.groups, updates=updates), mode=mode)
    assert str(caught.value).startswith(f"{name}: ")
    assert same(tensors(model), before)


def test_other_things_that_are_refused() -> None:
    model = tiny_model(dtype=torch.float16)
    graph = sspruner.trace(model)
    groups = half(graph).groups
    with pytest.raises(sspruner.PlanError, match="not finite in float16"):
        sspruner.apply(model, Plan(groups, updates={f"{OUT0}.bias": torch.full((4,), 1e5)}))
    with pytest.raises(sspruner.PlanError, match="nothing would be removed"):
        sspruner.apply(model, Plan({}, updates={f"{OUT0}.bias": torch.ones(4)}))
    check_plan(Plan(groups, updates={"of another model": torch.ones(2)}), graph)  # without the model
    with pytest.raises(sspruner.PlanError, match="not finite"):
        check_plan(Plan(groups, updates={"x": torch.tensor([torch.inf])}), graph)
    zamba = zoo("zamba2", bias=False)
    (one, two), *_ = (sorted(g) for g in sharing(zamba) if all(n.endswith("down_proj.weight") for n in g))
    bias = torch.ones(len(zamba.get_parameter(one)))
    for leaf, value in (("bias", bias), ("weight", zamba.get_parameter(one).detach())):
        names = [n.replace("weight", leaf) for n in (one, two)]
        with pytest.raises(sspruner.PlanError, match="is the same parameter as"):
            sspruner.apply(zamba, Plan(half(sspruner.trace(zamba)).groups, updates=dict.fromkeys(names, value)))
    weight = {one: zamba.get_parameter(one).detach(), one.replace("weight", "bias"): bias}
    sspruner.apply(zamba, Plan(half(sspruner.trace(zamba)).groups, updates=weight))
    with pytest.raises(sspruner.PlanError, match="has this bias already"):
        writing.add_bias(zamba, two.replace("weight", "bias"))
    with pytest.raises(sspruner.PlanError, match="no such parameter"):
        masking.update_tensors(zamba, {"nowhere": bias})


def test_a_mask_that_fails_leaves_the_model_alone() -> None:
    """Below `apply`, which checks first."""
    model = tiny_model()
    before, graph = tensors(model), sspruner.trace(model)
    with pytest.raises(sspruner.PlanError, match="a new value of shape"):
        masking.mask(model, Plan({}, updates={f"{OUT0}.bias": torch.ones(4), f"{IN0}.bias": torch.ones(2)}), graph)
    assert same(tensors(model), before)
    assert not masking.is_masked(model)


def no_write(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """A forgotten update."""


def half_written(parameter: torch.Tensor, value: torch.Tensor) -> None:
    parameter.data[1:] = value[1:].to(parameter.dtype)


@pytest.mark.parametrize("fault", [no_write, half_written])
@pytest.mark.parametrize("place", [[writing], [masking], [writing, masking]], ids=["slice", "mask", "both"])
@pytest.mark.parametrize("name", [f"{OUT0}.bias", f"{IN0}.weight"])
def test_the_proof_catches_a_forgotten_update(fault, place: list, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    for where in place:
        monkeypatch.setattr(where, "write", fault)
    shape = (4,) if name.endswith("bias") else (30, 4)
    plan = Plan(half(sspruner.trace(model)).groups, updates={name: torch.randn(shape)})
    with pytest.raises(sspruner.ProofError, match=r"logits differ|does not hold the new value"):
        sspruner.apply(model, plan)


def test_the_proof_catches_a_bias_that_the_cut_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias of zeros does not show in the logits: it is counted."""
    model = tiny_model()
    right = proof.slice_model

    def slice_model(model: torch.nn.Module, *args: object) -> None:
        right(model, *args)
        model.get_submodule(OUT0).bias = None

    monkeypatch.setattr(proof, "slice_model", slice_model)
    plan = Plan(half(sspruner.trace(model)).groups, updates={f"{OUT0}.bias": torch.zeros(4)})
    with pytest.raises(sspruner.ProofError, match="parameters are gone, the plan predicts"):
        sspruner.apply(model, plan)


def test_the_graph_from_before_the_bias_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a new trace a cut of the hidden size forgets the bias, and a mask of it does not silence it."""
    for module in (writing, masking):
        model = zoo("mamba", bias=False)
        plan = half(sspruner.trace(model), "hidden")
        plan = Plan(plan.groups, updates=out_biases(model))
        with monkeypatch.context() as patch:
            old = sspruner.trace(model)
            patch.setattr(module, "trace", lambda model, old=old: old)
            with pytest.raises(sspruner.ProofError, match=r"logits differ|does not run"):
                sspruner.apply(model, plan)


def test_a_bias_dropped_at_load_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    sspruner.apply(model, Plan(half(sspruner.trace(model)).groups, updates={f"{OUT0}.bias": torch.ones(4)}))
    folder = sspruner.save(model, tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setattr(loading, "add_bias", lambda model, name: None)
        with pytest.raises(sspruner.ModelError, match=rf"knows nothing of 1 of its weights, e.g. {OUT0}.bias"):
            sspruner.load(folder)
    config = json.loads((folder / "config.json").read_text())
    for biases, message in (([], "knows nothing of"), (3, "not a list of names"), (["lm_head"], "no such parameter"),
                            ([f"{OUT0}.bias"] * 2, "has this bias already")):  # fmt: skip
        config["sspruner"]["cuts"][0]["biases"] = biases
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(sspruner.SSPrunerError, match=message):
            sspruner.load(folder)


def test_plans_keep_the_dtype_of_new_values(tmp_path: Path) -> None:
    values = {"a.weight": torch.randn(3, 2, dtype=torch.bfloat16), "b.bias": torch.randn(4)[::2]}
    plan = Plan(half(sspruner.trace(tiny_model())).groups, updates=values)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert again.updates["a.weight"].dtype == torch.bfloat16
    assert str(plan).endswith("new values for 2 parameters")
    assert plan != Plan(plan.groups, updates={**values, "b.bias": torch.zeros(2)})
    assert plan != Plan(plan.groups)
    assert plan.axes == ("state",)
