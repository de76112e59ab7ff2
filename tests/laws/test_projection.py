"""Projections of the state: masked = sliced in every family that can have them, saved, loaded, compiled, cut again."""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import sspruner
from sspruner.plans.plan import Plan, basis_refused
from sspruner.plans.reduction import Projection, Selection
from sspruner.runtime import projected_state
from sspruner.surgery import project, proof
from sspruner.testing.plans import directions
from support.examples import examples
from support.family_plans import DELTA, KDA
from support.native import native_model
from support.projected import ANY_BASIS, PROJECTED, every_state, orthogonal, projection
from support.round_trip import check_round_trip
from support.tensors import same, tensors
from support.tiny import close, half, logits, models, plans, tiny_model, tokens
from support.zoo import zoo, zoo_models
from support.zoo_variants import cached

OTHERS = ("mamba", "falcon_mamba", "jamba", "zamba")
each_family = pytest.mark.parametrize("family", PROJECTED)
each_basis = pytest.mark.parametrize("family", ANY_BASIS)


def with_projected_C(model: Any, plan: Plan, ids: torch.Tensor, patch: pytest.MonkeyPatch) -> torch.Tensor:
    """The logits of stock's own forward, where every scan is given C decode encode instead of C."""
    layers = [site.path for site in sspruner.trace(model).layers]
    stock = sys.modules[type(model.get_submodule(layers[0])).__module__]
    scan, turns = stock.mamba2_chunk_scan, iter(layers)

    def other(x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, **rest: Any) -> Any:
        r = plan.groups[f"{next(turns)}:state"]
        return scan(x, dt, A, B, torch.einsum("btgn,gnm->btgm", C, r.decode @ r.encode), **rest)

    with patch.context() as inside:
        inside.setattr(stock, "mamba2_chunk_scan", other)
        return logits(model, ids)


@pytest.mark.cover
@each_family
@examples(6)
@given(st.data())
def test_a_full_basis_is_the_identity(family: str, data: st.DataObject) -> None:
    """k = N directions compute what the model computed, by a slice and by a mask."""
    model = data.draw(zoo_models((family,)))
    graph, ids = sspruner.trace(model), tokens()
    expected = logits(model, ids)
    plan = every_state(graph, 1.0, data.draw(st.integers(0, 99)))
    for sliced in (True, False):
        other = copy.deepcopy(model)
        for name, r in plan.groups.items():
            layer = name.rpartition(":")[0]
            project.install(other, layer, (project.sliced if sliced else project.masked)(None, r))
        close(logits(other, ids), expected, model, ids)


@examples(25)
@given(zoo_models(ANY_BASIS), st.data())
def test_masked_equals_sliced(model: Any, data: st.DataObject) -> None:
    """Alone, and beside cuts of other axes; then once more on top of the first."""
    ids = tokens()
    for _ in range(data.draw(st.integers(1, 2))):
        graph = sspruner.trace(model)
        wide = any(group.units > 1 for group in graph.on_axis("state").values())
        axes = ("state",) if wide and data.draw(st.booleans()) else ()
        plan = directions(data.draw(plans(graph, axes)), graph, data.draw(st.integers(0, 99)))
        masked = sspruner.apply(copy.deepcopy(model), plan, mode="mask")
        model = sspruner.apply(model, plan)
        close(logits(model, ids), logits(masked, ids), masked, ids)


@pytest.mark.cover
@pytest.mark.parametrize("family", DELTA)
def test_an_orthogonal_basis_leaves_a_delta_rule_as_it_is(family: str) -> None:
    """Keys and queries may be rotated; an oblique basis would need one key to write and another to erase."""
    model, ids = zoo(family), tokens()
    expected = logits(model, ids)
    groups = sspruner.trace(model).on_axis("state")
    for basis in (orthogonal, projection):
        for sliced in (True, False):
            other = copy.deepcopy(model)
            for i, group in enumerate(groups.values()):
                r = basis(group.groups, group.units, group.units, i)
                project.install(other, group.layer, (project.sliced if sliced else project.masked)(None, r))
            if basis is orthogonal:
                close(logits(other, ids), expected, model, ids)
            else:
                assert (logits(other, ids) - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("family", KDA)
def test_decays_by_key_channel_have_no_other_basis(family: str) -> None:
    model = zoo(family)
    with pytest.raises(sspruner.PlanError, match="cannot be projected: the decay differs by key channel"):
        sspruner.apply(model, every_state(sspruner.trace(model)))


@pytest.mark.cover
@each_family
def test_a_mask_is_the_projector_and_a_slice_has_its_rank(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = zoo(family), tokens()
    graph = sspruner.trace(model)
    plan = every_state(graph)
    masked = sspruner.apply(copy.deepcopy(model), plan, mode="mask")
    close(logits(masked, ids), with_projected_C(model, plan, ids, monkeypatch), model, ids)
    assert (logits(masked, ids) - logits(model, ids)).abs().max() > 1e-3 * logits(model, ids).abs().max()
    before = proof.measured_state_bytes(model, ids), graph.state_bytes
    sliced = sspruner.apply(model, plan)
    after = proof.measured_state_bytes(sliced, ids), sspruner.trace(sliced).state_bytes
    assert before[0] == before[1]
    assert after[0] == after[1] == before[0] // 2
    for name, r in plan.groups.items():
        mixer = sliced.get_submodule(name.rpartition(":")[0])
        assert mixer.state_encode.shape == (r.sets, r.after, r.before)
        assert mixer.state_decode.shape == (r.sets, r.before, r.after)
        assert sspruner.trace(sliced).groups[name].units == r.after


def test_the_slow_truth_of_a_projection() -> None:
    """A state of k written down step by step: h' = decay h' + dt x (x) E B, y = (decode^T C) . h', in fp64."""
    from sspruner.graph.family import Projected
    from support.oracle import mamba2_mixer, output

    model = tiny_model(groups=2, state=6, layers=1).double()
    mixer, hidden = model.backbone.layers[0].mixer, torch.randn(2, 19, model.config.hidden_size, dtype=torch.float64)
    assert (mixer(hidden) - mamba2_mixer(mixer, hidden)).abs().max() < 1e-5  # stock's scan is fp32
    family = sspruner.trace(model).layers[0].family
    p = family.project(mixer, hidden, torch.ones(2, 19, dtype=torch.bool))
    r = projection(2, 6, 4)
    B = torch.einsum("gkn,btgn->btgk", r.encode.double(), p.B)
    C = torch.einsum("gnk,btgn->btgk", r.decode.double(), p.C)
    y = output(Projected(p.x, p.z, p.dt, p.A, B, C, p.D)).flatten(2)
    expected = mixer.out_proj(mixer.norm(y, p.z).double())
    sspruner.apply(model, Plan({"backbone.layers.0.mixer:state": r}))
    torch.testing.assert_close(mixer(hidden), expected, rtol=0, atol=1e-5 * float(expected.detach().abs().max()))
    q = family.project(mixer, hidden, torch.ones(2, 19, dtype=torch.bool))
    torch.testing.assert_close(q.B, B)
    torch.testing.assert_close(q.C, C)


@pytest.mark.cover
@each_basis
def test_decoding_with_a_cache_is_the_whole_forward(family: str) -> None:
    """A prefill of 7 tokens, then one token after another."""
    model, ids = sspruner.apply(zoo(family), every_state(sspruner.trace(zoo(family)))), tokens(2, 12)
    with torch.no_grad():
        close(cached(model, ids, [7, 1, 1, 1, 1, 1]), logits(model, ids), model, ids)


@pytest.mark.cover
@each_basis
def test_padding_does_not_matter(family: str) -> None:
    model = sspruner.apply(zoo(family), every_state(sspruner.trace(zoo(family))))
    ids = tokens(1, 9)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    seen = torch.cat([torch.zeros(1, 4, dtype=torch.long), torch.ones_like(ids)], 1)
    alone, beside = logits(model, ids), logits(model, padded, attention_mask=seen)[:, 4:]
    stock = zoo(family)
    same = (logits(stock, ids) - logits(stock, padded, attention_mask=seen)[:, 4:]).abs().max()
    assert (alone - beside).abs().max() <= max(1e-4 * alone.abs().max(), 4 * same)  # as well as stock's own code does


@each_family
def test_gradients_reach_everything(family: str) -> None:
    """The gradient of encode and decode, and through them of the rows of B and C, against differences in fp64."""
    model = zoo(family).double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    layer = sspruner.trace(model).layers[0].path
    r = next(iter(every_state(sspruner.trace(model)).groups.values()))
    mixer = model.get_submodule(layer)
    projected_state.project_state(mixer, r.encode.double(), r.decode.double())
    drawn = torch.randn(2, 11, mixer.in_proj.weight.shape[1], generator=torch.Generator().manual_seed(0)).double()
    hidden, probe = drawn[:1], drawn[1:]

    def loss() -> torch.Tensor:
        return (mixer(hidden) * probe).sum()

    loss().backward()
    for name in ("state_encode", "state_decode", "in_proj.weight", "A_log"):
        parameter = mixer.get_parameter(name)
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        slope = float((parameter.grad * direction).sum())
        with torch.no_grad():
            step = 3e-4  # the scan runs in fp32
            ahead = loss_at(loss, parameter, direction, step)
            back = loss_at(loss, parameter, direction, -step)
        assert slope == pytest.approx((ahead - back) / (2 * step), rel=2e-2, abs=1e-3), name


def loss_at(loss: Any, parameter: torch.Tensor, direction: torch.Tensor, step: float) -> float:
    parameter.data.add_(direction, alpha=step)
    found = float(loss())
    parameter.data.add_(direction, alpha=-step)
    return found


@pytest.mark.exhaustive
@pytest.mark.slow
@each_family
def test_compiles_in_one_graph_as_stock_does(family: str) -> None:
    model = sspruner.apply(zoo(family), every_state(sspruner.trace(zoo(family))))
    ids = tokens()
    torch._dynamo.reset()
    stock = torch._dynamo.explain(zoo(family))(input_ids=ids, use_cache=False).graph_break_count
    torch._dynamo.reset()
    assert torch._dynamo.explain(model)(input_ids=ids, use_cache=False).graph_break_count == stock
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=stock == 0)
    with torch.no_grad():
        out = compiled(input_ids=ids, use_cache=False).logits
    close(out.float(), logits(model, ids), model, ids)


def replaced_forwards(model: Any) -> dict[str, Any]:
    return {n: (f.func, f.args[0] is m) for n, m in model.named_modules() if (f := vars(m).get("forward"))}


@pytest.mark.slow
@examples(15)
@given(zoo_models(PROJECTED), st.sampled_from([torch.float32, torch.bfloat16]), st.data())
def test_unmask_restores_every_bit(model: Any, dtype: torch.dtype, data: st.DataObject) -> None:
    """Of a model without a basis, and of one that has one already."""
    model = model.to(dtype)
    if data.draw(st.booleans()):
        assume(any(group.units > 1 for group in sspruner.trace(model).on_axis("state").values()))
        sspruner.apply(model, every_state(sspruner.trace(model), 0.9))
    before, forwards = tensors(model), replaced_forwards(model)
    graph = sspruner.trace(model)
    assume(any(group.units > 1 for group in graph.on_axis("state").values()))
    sspruner.apply(model, every_state(graph, 0.5, 7), mode="mask")
    assert not same(tensors(model), before)
    sspruner.unmask(model)
    assert same(tensors(model), before)
    assert replaced_forwards(model) == forwards
    assert str(sspruner.trace(model)) == str(graph)


@pytest.mark.slow
@examples(15)
@given(st.one_of(zoo_models(ANY_BASIS), models(least_state=2)), st.data())
def test_saved_and_loaded(model: Any, data: st.DataObject) -> None:
    """Any plan with projections, cut once or twice: every bit, every generated token."""
    for _ in range(data.draw(st.integers(1, 2))):
        graph = sspruner.trace(model)
        sspruner.apply(model, directions(data.draw(plans(graph)), graph, data.draw(st.integers(0, 99))))
    with tempfile.TemporaryDirectory() as folder:
        check_round_trip(model, Path(folder) / "model")


@pytest.mark.ci_cover
@pytest.mark.slow
@each_basis
@pytest.mark.parametrize("twice", [False, True])
def test_a_masked_model_is_saved_as_it_is(family: str, twice: bool, tmp_path: Path) -> None:
    """With its projector, on top of a basis too. What is loaded is not masked: the projector is among its weights."""
    model, ids = zoo(family), tokens()
    if twice:
        sspruner.apply(model, every_state(sspruner.trace(model), 0.9))
    fields = copy.deepcopy(getattr(model.config, "sspruner", None))
    sspruner.apply(model, every_state(sspruner.trace(model), 0.5, 7), mode="mask")
    loaded, _ = sspruner.load(sspruner.save(model, tmp_path / "model"))
    assert torch.equal(logits(copy.deepcopy(loaded), ids), logits(copy.deepcopy(model), ids))
    assert getattr(model.config, "sspruner", None) == fields
    check_round_trip(loaded, tmp_path / "again")


@pytest.mark.slow
@pytest.mark.cover
@each_basis
def test_encode_and_decode_stay_fp32_in_a_narrow_checkpoint(family: str, tmp_path: Path) -> None:
    model = zoo(family, dtype=torch.bfloat16)
    plan = every_state(sspruner.trace(model))
    sspruner.apply(model, plan)
    folder = sspruner.save(model, tmp_path / "model")
    for dtype in ("auto", "bfloat16", "float16"):
        loaded, _ = sspruner.load(folder, dtype=dtype)
        for name, r in plan.groups.items():
            mixer = loaded.get_submodule(name.rpartition(":")[0])
            assert torch.equal(mixer.state_encode, r.encode)
            assert torch.equal(mixer.state_decode, r.decode)
            assert mixer.conv1d.weight.dtype == (torch.float16 if dtype == "float16" else torch.bfloat16)


def test_stock_classes_do_not_read_it_as_something_else(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model()
    folder = sspruner.save(sspruner.apply(model, every_state(sspruner.trace(model))), tmp_path / "model")
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_plan_with_projections_is_the_same_from_a_file(tmp_path: Path) -> None:
    model = tiny_model(groups=2)
    plan = every_state(sspruner.trace(model))
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    line = json.loads((tmp_path / "plan.json").read_text())["groups"]["backbone.layers.0.mixer:state"]
    assert line == {"before": 6, "after": 3, "sets": 2}
    again = sspruner.apply(copy.deepcopy(model), Plan.load(tmp_path / "plan.json"))
    assert torch.equal(logits(again, tokens()), logits(sspruner.apply(model, plan), tokens()))


def test_a_plan_whose_matrices_are_gone_or_others_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    plan = every_state(sspruner.trace(model))
    plan.save(tmp_path / "plan.json")
    (tmp_path / "plan.safetensors").rename(tmp_path / "gone")
    with pytest.raises(sspruner.PlanError, match=r"its tensors are missing: no file plan\.safetensors beside it"):
        Plan.load(tmp_path / "plan.json")
    every_state(sspruner.trace(model), seed=5).save(tmp_path / "other.json", tmp_path / "plan.safetensors")
    with pytest.raises(sspruner.PlanError, match="are not those of this plan"):
        Plan.load(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    del data["tensors"]
    with pytest.raises(sspruner.PlanError, match="the matrices of its projection are missing"):
        sspruner.apply(model, Plan.from_json(data))


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda e, d: (e * 1.01, d), r"encode @ decode is not the identity \(off by 1.0e-02\)"),
        (lambda e, d: (e, d * float("nan")), "is not the identity"),
        (lambda e, d: (e, d[:, :, :-1]), r"encode is \(1, 3, 6\), decode \(1, 6, 2\)"),
        (lambda e, d: (e.double(), d), "are fp32"),
        (lambda e, d: (e[:, :, :5], torch.linalg.pinv(e[:, :, :5])), "the plan starts from 1 x 5 units, the model has"),
    ],
)
def test_what_is_no_projection_of_this_model_is_refused(spoil: Any, why: str) -> None:
    model = tiny_model()
    before = tensors(model)
    r = projection(1, 6, 3)
    with pytest.raises(sspruner.PlanError, match=why):
        sspruner.apply(model, Plan({"backbone.layers.0.mixer:state": Projection(*spoil(r.encode, r.decode))}))
    assert same(tensors(model), before)


@pytest.mark.parametrize("family", OTHERS)
def test_mamba1_is_refused_with_the_reason(family: str) -> None:
    model = zoo(family)
    why = "every state of every channel decays at its own rate"
    with pytest.raises(sspruner.PlanError, match=f"cannot be projected: {why}"):
        sspruner.apply(model, every_state(sspruner.trace(model)))
    with pytest.raises(sspruner.InputError, match=f"{why}, .*; use --basis select"):
        sspruner.prune(model, basis="balanced", calibration=tokens(3, 16))


def test_native_modules_and_other_axes_are_refused() -> None:
    with pytest.raises(sspruner.InputError, match="no projection of B and C; load the model with transformers"):
        sspruner.prune(native_model("Mamba2"), basis="balanced", calibration=tokens(3, 16))
    model = tiny_model()
    with pytest.raises(sspruner.PlanError, match="only the state of Mamba2-type mixers can have another basis"):
        sspruner.apply(model, Plan({"backbone.layers.0.mixer:head_dim": projection(2, 4, 2)}))


@each_basis
def test_every_family_that_ships_says_whether_it_can(family: str) -> None:
    graph = sspruner.trace(zoo(family))
    assert not any(basis_refused(group, graph) for group in graph.on_axis("state").values())


def test_selecting_among_directions() -> None:
    """A model with a basis is cut again by units: they are the directions, and no row of in_proj goes."""
    model = tiny_model(groups=2, state=6)
    sspruner.apply(model, every_state(sspruner.trace(model), 0.9))  # 5 directions
    rows = model.backbone.layers[0].mixer.in_proj.weight.shape
    graph, ids = sspruner.trace(model), tokens()
    group = graph.groups["backbone.layers.0.mixer:state"]
    assert group.units == 5
    assert {m.tensor.rpartition(".")[2] for m in group.members} == {"state_encode", "state_decode"}
    plan = half(graph)
    masked = sspruner.apply(copy.deepcopy(model), plan, mode="mask")
    sspruner.apply(model, plan)
    mixer = model.backbone.layers[0].mixer
    assert mixer.in_proj.weight.shape == rows
    assert mixer.state_encode.shape == (2, 3, 6)
    close(logits(model, ids), logits(masked, ids), masked, ids)
    result = sspruner.prune(model, "ghost", sparsity=0.5, calibration=tokens(4, 24))
    assert all(isinstance(s, Selection) for s in result.plan.groups.values())


@given(models(dtypes=(torch.float32,), least_state=2))
def test_a_wrong_factor_is_seen_by_the_proof(model: Any) -> None:
    """encode of another projection than the slice's: the proof fails."""
    plan = every_state(sspruner.trace(model))
    masked = project.masked
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(project, "masked", lambda held, r: (masked(held, r)[0] * 1.1, masked(held, r)[1]))
        with pytest.raises(sspruner.ProofError, match="sliced and masked logits differ"):
            sspruner.apply(model, plan)
