"""Zeros in single elements: masked = sliced, the same zeros on disk, and every wrong place is caught."""

from __future__ import annotations

import copy
import json
import re
import tempfile
from io import StringIO
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file, save_file

import sspruner
from sspruner.plans.plan import Plan, check_plan
from sspruner.plans.reduction import Selection
from sspruner.pruning.report import Report, sparsity_of
from sspruner.pruning.table import result_table
from sspruner.surgery import mask as masking
from sspruner.surgery import proof
from sspruner.surgery import tensors as writing
from sspruner.surgery.predict import zeros_left
from support.elements import masks, mixed, random_mask
from support.examples import examples
from support.round_trip import STOCK, check_round_trip
from support.stock_process import run_stock
from support.tensors import same, tensors
from support.tiny import close, half, logits, tiny_model, tokens
from support.zoo import FAMILIES, zoo, zoo_models
from support.zoo_variants import sharing

BOTH = st.sampled_from([torch.float32, torch.bfloat16])
IN0 = "backbone.layers.0.mixer.in_proj:weight"


def everywhere(graph: sspruner.SSMGraph, density: float = 0.5) -> Plan:
    """A mask of every tensor that may have one."""
    groups = graph.elements.values()
    return Plan({}, elements={g.name: random_mask((g.groups, g.units), i, density) for i, g in enumerate(groups)})


def at(model: torch.nn.Module, name: str) -> torch.Tensor:
    return model.get_parameter(sspruner.trace(model).elements[name].tensor)


@examples(25)
@given(zoo_models(), BOTH, st.data())
def test_unmask_restores_the_original_bits(model: torch.nn.Module, dtype: torch.dtype, data: st.DataObject) -> None:
    before, shared = tensors(model.to(dtype)), sharing(model)
    plan = data.draw(mixed(model))
    sspruner.apply(model, plan, mode="mask")
    assert all(not at(model, name)[~keep].any() for name, keep in plan.elements.items())
    if plan.elements and not plan.groups:
        untouched = {sspruner.trace(model).elements[name].tensor: keep for name, keep in plan.elements.items()}
        now = tensors(model)
        assert all(torch.equal(now[n][keep], before[n][keep]) for n, keep in untouched.items())
    sspruner.unmask(model)
    assert same(tensors(model), before)
    assert sharing(model) == shared


@pytest.mark.slow
@examples(25)
@given(zoo_models(), st.data())
def test_masked_equals_sliced(model: torch.nn.Module, data: st.DataObject) -> None:
    """Units of any axis and elements of any tensor in one plan; the zeros are counted in what is left."""
    plan, ids = data.draw(mixed(model)), tokens()
    expected = zeros_left(model, plan, sspruner.trace(model))
    masked = sspruner.apply(copy.deepcopy(model), plan, mode="mask")
    found = proof.slice_with_proof(model, plan, sspruner.trace(model))
    close(logits(model, ids), logits(masked, ids), masked, ids)
    assert found.zeros == sum(int(zero.sum()) for zero in expected.values())
    assert all(not model.get_parameter(name)[zero].any() for name, zero in expected.items())
    assert found.parameters_added == 0


@pytest.mark.ci_cover(families=6)
@pytest.mark.cover(families=4)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_elements_alone_change_values_and_nothing_else(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """In every tensor of every family: shapes, config, other values and shared parameters stay as they were."""
    model = zoo(family, dtype=dtype)
    before, shared, graph = tensors(model), sharing(model), sspruner.trace(model)
    config, plan = copy.deepcopy(vars(model.config)), everywhere(graph)
    sspruner.apply(model, plan)
    keeps = {id(at(model, name)): keep for name, keep in plan.elements.items()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        keep = keeps.get(id(parameter), torch.ones_like(parameter, dtype=torch.bool))
        assert torch.equal(parameter, before[name] * keep)
    assert vars(model.config) == config
    assert sharing(model) == shared
    check_round_trip(model, tmp_path / "model")
    assert ("decay" in plan.axes) == (family in ("mamba", "falcon_mamba", "jamba"))


def test_a_second_cut_moves_the_zeros_along() -> None:
    """Elements, then states, then other elements and the first block: zeros stay zeros under new names."""
    model = tiny_model(layers=3)
    sspruner.apply(model, everywhere(sspruner.trace(model)))
    zeros = sparsity_of(model, sspruner.trace(model), ["weight"])["zeros"]
    sspruner.apply(model, half(sspruner.trace(model)))
    assert 0 < sparsity_of(model, sspruner.trace(model), ["weight"])["zeros"] < zeros
    graph = sspruner.trace(model)
    keep = random_mask((graph.elements[IN0.replace("0", "2")].groups, graph.elements[IN0].units), 3)
    blocks = {"backbone.layers:block": Selection(3, ((1, 2),))}
    state = {n: s for n, s in half(graph).groups.items() if "layers.2" in n}
    for groups in (blocks, blocks | state):
        again, elements = copy.deepcopy(model), {IN0.replace("0", "2"): keep, IN0: random_mask(keep.shape, 4)}
        plan = Plan(groups, elements=elements)
        assert list(zeros_left(again, plan, graph)) == ["backbone.layers.1.mixer.in_proj.weight"]
        found, gone = proof.slice_with_proof(again, plan, graph).zeros, int((~keep).sum())
        assert 0 < found < gone if groups is not blocks else found == gone


def test_a_shared_tensor_is_zeroed_once_and_everywhere() -> None:
    """Zamba2's blocks: named by the first layer that calls them; the first may go, the parameter stays."""
    model = zoo("zamba2")
    graph = sspruner.trace(model)
    name = next(n for n in graph.elements if n.endswith("feed_forward.down_proj:weight"))
    first = int(name.removeprefix("model.layers.").partition(".")[0])
    keep = random_mask((graph.elements[name].groups, graph.elements[name].units), 1)
    blocks = graph.groups["model.layers:block"].units
    stay = tuple(i for i in range(blocks) if i != first)
    plan = Plan({"model.layers:block": Selection(blocks, (stay,))}, elements={name: keep})
    (left,) = zeros_left(model, plan, graph)
    sspruner.apply(model, plan)
    assert not model.get_parameter(left)[~keep].any()
    assert len([n for n in graph.elements if n.endswith("down_proj:weight")]) == 2  # two blocks in three hybrid layers


@pytest.mark.slow
@examples(10)
@given(zoo_models(), st.data())
def test_load_gives_back_what_was_saved(model: torch.nn.Module, data: st.DataObject) -> None:
    for _ in range(data.draw(st.integers(1, 2))):
        sspruner.apply(model, data.draw(mixed(model)))
    with tempfile.TemporaryDirectory() as folder:
        check_round_trip(model, Path(folder) / "model")


@pytest.mark.exhaustive
@pytest.mark.slow
def test_zeros_load_in_a_process_that_never_imports_sspruner(tmp_path: Path) -> None:
    model = tiny_model(groups=2, layers=2)
    sspruner.apply(model, everywhere(sspruner.trace(model)))
    folder, ids = sspruner.save(model, tmp_path / "model"), tokens(2, 9)
    assert "sspruner" not in json.loads((folder / "config.json").read_text())
    result = run_stock(STOCK, str(folder), json.dumps(ids.tolist()), log=tmp_path / "read.log")
    assert torch.equal(torch.tensor(result["logits"]), logits(model, ids).double())


@examples(25)
@given(zoo_models(), st.data())
def test_plans_are_files(model: torch.nn.Module, data: st.DataObject) -> None:
    """Equal after a round trip; the JSON names shapes and counts, and the masks take a bit each."""
    plan = data.draw(mixed(model, values=True))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "some.plan.json"
        plan.save(path)
        assert Plan.load(path) == plan
        written = json.loads(path.read_text())
        stated = {n: {"shape": list(k.shape), "kept": int(k.sum())} for n, k in plan.elements.items()}
        assert written.get("elements", {}) == stated
        assert written.get("updates", {}) == {n: list(v.shape) for n, v in plan.updates.items()}
        files = {p.name for p in Path(folder).iterdir()}
        assert files == {path.name} | ({"some.plan.safetensors"} if stated or plan.updates else set())
        if stated:
            packed = load_file(Path(folder) / "some.plan.safetensors")
            assert all(packed[n].numel() == -(-k.numel() // 8) for n, k in plan.elements.items())
            name = next(iter(stated))
            other = Plan(plan.groups, elements={**plan.elements, name: ~plan.elements[name]}, updates=plan.updates)
            assert other != plan
            with pytest.raises(sspruner.PlanError, match=r"read it with Plan\.load"):
                Plan.from_json(written)


def test_a_plan_without_tensors_is_written_as_ever(tmp_path: Path) -> None:
    Plan({"a:state": Selection(4, ((0, 2),))}, {"fingerprint": "f"}, {"scorer": "s"}).save(tmp_path / "plan.json")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    assert (tmp_path / "plan.json").read_text() == (
        '{\n  "version": 1,\n  "model": {\n    "fingerprint": "f"\n  },\n  "axis": "state",\n  "made_by": {\n'
        '    "scorer": "s"\n  },\n  "groups": {\n'
        '    "a:state": {"before": 4, "after": 2, "keep": [[0, 2]]}\n  }\n}\n'
    )


def other_bits(file: Path) -> None:
    save_file({name: t ^ 1 for name, t in load_file(file).items()}, file)


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 128
    file.write_bytes(content)


FAULTS = {
    "missing": (lambda file: file.unlink(), "no file plan.safetensors beside it"),
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:-3]), "corrupt or truncated"),
    "not safetensors": (lambda file: file.write_text("zeros"), "corrupt or truncated"),
    "of another plan": (other_bits, "are not those of this plan"),
    "one bit flipped": (flipped, "are not those of this plan"),
    "nothing in it": (lambda file: save_file({}, file), "are not those of this plan"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_tensor_file_is_one_error(fault: str, tmp_path: Path) -> None:
    everywhere(sspruner.trace(tiny_model())).save(tmp_path / "plan.json")
    damage, message = FAULTS[fault]
    damage(tmp_path / "plan.safetensors")
    with pytest.raises(sspruner.PlanError, match=message) as caught:
        Plan.load(tmp_path / "plan.json")
    assert str(caught.value).startswith(f"plan {tmp_path / 'plan.json'}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [{"elements": {IN0: {"shape": [2, 2], "kept": 1}}}, {"elements": {IN0: {"shape": "x"}}}, {"elements": {"b": {}}},
     {"elements": {IN0: {"shape": [64, 8], "kept": 0}}}, {"elements": [3]}, {"updates": {"no": [2]}}, {"updates": 3}],
    ids=str,
)  # fmt: skip
def test_a_plan_that_says_otherwise_than_its_tensors_is_refused(change: dict, tmp_path: Path) -> None:
    Plan({}, elements={IN0: random_mask((64, 8), 0)}).save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(sspruner.PlanError, match="malformed plan"):
        Plan.load(tmp_path / "plan.json")


def test_what_does_not_fit_the_model_is_refused() -> None:
    model = tiny_model()
    graph, before = sspruner.trace(model), tensors(model)
    shape = graph.elements[IN0].groups, graph.elements[IN0].units
    wrong = {
        "the model has no such tensor.*nearest is backbone.layers.0.mixer.in_proj:weight": {
            "backbone.layers.0.mixer.inproj:weight": random_mask(shape, 0)
        },
        re.escape(f"the plan's mask is {shape[::-1]}, the model's tensor {shape}"): {IN0: random_mask(shape[::-1], 0)},
        "must be bool": {IN0: random_mask(shape, 0).float()},
        "nothing would be removed": {IN0: torch.ones(shape, dtype=torch.bool)},
    }
    for message, elements in wrong.items():
        for mode in ("mask", "slice"):
            with pytest.raises(sspruner.PlanError, match=message):
                sspruner.apply(model, Plan({}, elements=elements), mode=mode)
    assert same(tensors(model), before)
    with pytest.raises(sspruner.PlanError, match="model's tensor"):
        masking.mask_elements(model, graph.elements[IN0], random_mask((2, 2), 0))
    check_plan(Plan({}, elements={IN0: random_mask(shape, 0)}), graph)


def rolled(monkeypatch: pytest.MonkeyPatch, where: object) -> None:
    """As many zeros, a column further on."""
    right = writing.zero
    monkeypatch.setattr(where, "zero", lambda parameter, keep: right(parameter, keep.roll(1, 1)))


def forgotten(monkeypatch: pytest.MonkeyPatch, where: object) -> None:
    monkeypatch.setattr(where, "zero", lambda parameter, keep: None)


@pytest.mark.parametrize("fault", [rolled, forgotten])
@pytest.mark.parametrize("place", [[writing], [masking], [writing, masking]], ids=["slice", "mask", "both"])
def test_the_proof_catches_wrong_zeros(fault, place: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only one of both is wrong, logits differ; where both are, the zeros are not where they are predicted."""
    model = tiny_model()
    for where in place:
        fault(monkeypatch, where)
    with pytest.raises(sspruner.ProofError, match=r"logits differ|zeros where the plan predicts"):
        sspruner.apply(model, everywhere(sspruner.trace(model)))


def test_the_proof_catches_zeros_that_are_lost_in_the_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask is not needed to see it: here the tensor does not reach the logits."""
    model = tiny_model(layers=1)
    with torch.no_grad():
        model.backbone.layers[0].mixer.out_proj.weight.zero_()
    right = proof.slice_model

    def slice_model(model: torch.nn.Module, *args: object) -> None:
        right(model, *args)
        model.backbone.layers[0].mixer.in_proj.weight.data[0, 0] = 1

    monkeypatch.setattr(proof, "slice_model", slice_model)
    plan = everywhere(sspruner.trace(model), density=0)
    with pytest.raises(sspruner.ProofError, match=r"in_proj.weight has .* zeros where the plan predicts"):
        sspruner.apply(model, plan)


def test_sparsity_is_counted_in_the_model() -> None:
    model = zoo("mamba")
    graph = sspruner.trace(model)
    A_log = next(n for n in graph.elements if n.endswith(":decay"))
    keep = random_mask((graph.elements[A_log].groups, graph.elements[A_log].units), 0)
    sspruner.apply(model, Plan({}, elements={A_log: keep}))
    found = sparsity_of(model, sspruner.trace(model), ["decay", "state"])
    assert found["zeros"] == int((~keep).sum())
    assert found["elements"] == 3 * keep.numel()
    assert found["tensors"][graph.elements[A_log].tensor]["sparsity"] == int((~keep).sum()) / keep.numel()
    assert sparsity_of(model, graph, ["state"]) == {}
    assert sparsity_of(model, graph, ["weight"])["zeros"] == 0


def test_the_table_says_what_zeros_are_worth() -> None:
    model = tiny_model()
    plan = everywhere(sspruner.trace(model), density=0.75)
    found = proof.slice_with_proof(model, plan, sspruner.trace(model))
    sizes = {"state_bytes": 1, "parameters": 2, "weight_bytes": 3, "perplexity": 4.0, "kl_to_dense": 0.0}
    data = {"source": "self", "tokens": 1, "held_out_tokens": 1, "seq_len": 2, "held_out_is_separate": True}
    report = Report(
        scorer="s", options={}, axis="weight", budget={}, mode="slice", one_shot=False, calibration=data, dense=sizes,
        pruned=sizes, layers={}, proof=found, continuation=None, seconds={}, peak_memory_bytes=0, seed=0, versions={},
        sparsity=sparsity_of(model, sspruner.trace(model), plan.axes),
    )  # fmt: skip
    console = Console(width=200, file=StringIO())
    console.print(result_table(report))
    shown = console.file.getvalue()
    assert re.search(r"element sparsity +│ +│ +2\d\.\d\d %", shown)
    assert "zeros make nothing faster with dense kernels, and no file smaller" in shown
    assert f"{found.zeros:,} zeros in their places" in shown
    assert json.loads(report.to_json())["sparsity"]["zeros"] == found.zeros


def test_a_saved_result_keeps_its_plan_away_from_the_weights(tmp_path: Path) -> None:
    plan = everywhere(sspruner.trace(tiny_model()))
    (tmp_path / "sspruner").mkdir()
    plan.save(tmp_path / "plan.json", tensors=tmp_path / "sspruner" / "plan.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json", "sspruner"]
    assert Plan.load(tmp_path / "plan.json") == plan
    assert "  backbone.layers.0.mixer.in_proj:weight" in str(plan)
    assert re.search(r"in_proj:weight +30 x 4, \d\d\.\d % zeros", str(plan))


@examples(15)
@given(zoo_models(), st.data())
def test_masks_pile_up_and_come_off_in_reverse(model: torch.nn.Module, data: st.DataObject) -> None:
    """As the walk over the layers makes them: groups and elements of the same tensors, in any order."""
    graph, before = sspruner.trace(model), tensors(model)
    for _ in range(data.draw(st.integers(1, 4))):
        plan = data.draw(mixed(model))
        for name, selection in plan.groups.items():
            masking.mask_group(model, graph.groups[name], selection)
        for name, keep in data.draw(masks(graph)).items():
            masking.mask_elements(model, graph.elements[name], keep)
            assert not at(model, name)[~keep].any()
    sspruner.unmask(model)
    assert same(tensors(model), before)
