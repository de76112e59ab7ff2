"""Reconstruction: only what stays of the cut units changes, no error rises, and it is the method as written."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import sspruner
from sspruner.compute import quick_scan
from sspruner.graph.site import within
from sspruner.pruning import fit as fitting
from sspruner.pruning import reconstruct as reconstructing
from sspruner.pruning import refit as refitting
from sspruner.pruning.student import Student, output
from sspruner.recipes.parts import Reconstruction
from sspruner.surgery.mask import mask
from sspruner.testing.models import rounding
from sspruner.testing.plans import directions, selection
from support.examples import examples
from support.family_plans import AXES, MAMBA2
from support.scoring import calibrated
from support.tiny import tiny_model, tokens
from support.zoo import FAMILIES, zoo

UNFIT = {"hidden", "block", "mixer"}
CASES = [(family, axis) for family in FAMILIES for axis in AXES[family] if axis not in UNFIT]
STEPS = Reconstruction(refit_steps=6, refit_windows=8)


def windows(count: int = 8, length: int = 12, seed: int = 0) -> sspruner.Calibration:
    return calibrated(tokens(count, length, seed=seed))


def half_plan(model: Any, axis: str, seed: int = 0) -> sspruner.Plan:
    """Remove about half of the units of one axis, others in every set and layer."""
    chosen = {}
    for number, (name, group) in enumerate(sspruner.trace(model).on_axis(axis).items()):
        after = min(group.counts(), key=lambda n: (abs(n - group.units // 2), n), default=group.units)
        chosen[name] = selection(group.groups, group.units, after, seed + number)
    return sspruner.Plan(chosen)


def reconstructed(
    model: Any, plan: sspruner.Plan, data: sspruner.Calibration | None = None, settings: Reconstruction = STEPS
) -> sspruner.Refit:
    return sspruner.refit(model, plan, "reconstruct", calibration=data or windows(), settings=settings)


def cut_elements(model: Any, plan: sspruner.Plan) -> dict[str, torch.Tensor]:
    """For every parameter which elements belong to units of cut groups that stay, by the members of the groups."""
    marks = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters(remove_duplicate=False)}
    graph, removed = sspruner.trace(model), {name: torch.zeros_like(mark) for name, mark in marks.items()}
    for name, reduction in plan.groups.items():
        for member in graph.groups[name].members:
            if not member.counted:
                continue
            for number in range(reduction.sets):
                for unit in range(reduction.before):
                    rows = member.index[number, unit]
                    where = removed if unit in reduction.dropped(number) else marks
                    front = where[member.tensor].movedim(member.dims, tuple(range(len(member.dims))))
                    front[torch.unravel_index(rows, front.shape[: len(member.dims)])] = True
    return {name: mark & ~removed[name] for name, mark in marks.items()}


def masked_equals_sliced(model: Any, plan: sspruner.Plan) -> None:
    """In fp32, whatever the dtype of the weights."""
    ids, wide = tokens(2, 9, seed=5), copy.deepcopy(model).float()
    sliced = copy.deepcopy(wide)
    sspruner.apply(sliced, plan)
    with sspruner.masked(wide, plan), torch.no_grad():
        logits, tolerance = wide(input_ids=ids).logits, max(1e-4, 8 * rounding(wide, ids))
        assert (sliced(input_ids=ids).logits - logits).abs().max() <= tolerance * logits.abs().max().clamp_min(1)


@pytest.mark.ci_cover(families=5)
@pytest.mark.cover(families=2)
@pytest.mark.parametrize(("family", "axis"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_what_stays_of_the_cut_units_changes_and_no_mean_error_rises(family, axis, dtype):
    model = zoo(family).to(dtype)
    before = copy.deepcopy(model.state_dict())
    plan = half_plan(model, axis)
    found = reconstructed(model, plan)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found.plan.groups == plan.groups
    allowed = cut_elements(model, plan)
    for name, value in found.plan.updates.items():
        assert value.dtype == dtype
        moved = value != before[name]
        assert not (moved & ~allowed[name]).any(), name
    assert set(found.errors) == {name.rpartition(":")[0] for name in plan.groups}
    for path, layer in found.layers.items():
        start, end = found.errors[path]
        assert (end < start) if layer.step else (end == start), path
        assert (layer.step > 0) == any(within(name, path) for name in found.plan.updates)
    masked_equals_sliced(model, found.plan)


@given(errors=st.lists(st.tuples(*[st.floats(0.1, 2)] * 2), min_size=5, max_size=5))
@examples(10)
def test_the_step_with_the_lowest_mean_error_is_kept(errors):
    """The geometric one, of the start and four steps, whichever of the two texts gains; the start if none is lower."""
    scripted = [dict(zip(("text", "own text"), pair, strict=True)) for pair in errors]
    model, left = tiny_model(layers=1), iter(scripted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "_errors", lambda *_: next(left))
        found = reconstructed(model, half_plan(model, "state"), settings=Reconstruction(refit_steps=8, refit_windows=8))
    (layer,) = found.layers.values()
    means = [math.prod(pair) for pair in errors]
    best = means.index(min(means))
    assert layer.step == 2 * best
    assert layer.held_out == {kind: (scripted[0][kind], scripted[best][kind]) for kind in scripted[0]}
    assert layer.error == pytest.approx((means[0] ** 0.5, means[best] ** 0.5))
    assert bool(found.plan.updates) == (best > 0)


def test_layers_that_keep_all_their_units_are_left_alone():
    model = tiny_model()
    names = list(sspruner.trace(model).on_axis("state"))
    plan = sspruner.Plan({names[0]: selection(1, 6, 6, 0), names[1]: selection(1, 6, 3, 0)})
    found = reconstructed(model, plan)
    assert list(found.layers) == ["backbone.layers.1.mixer"]
    assert all(name.startswith("backbone.layers.1.mixer.") for name in found.plan.updates)


@torch.no_grad()
def checkpoint(
    mixer: Any, u: torch.Tensor, target: torch.Tensor, leaves: dict[str, Any]
) -> tuple[float, dict[str, Any]]:
    """The held-out error at this step, and the values."""
    error = float((mixer(u) - target).double().square().sum())
    return error, {name: p.detach().clone() for name, p in leaves.items()}


def plainly(model: Any, plan: sspruner.Plan, data: sspruner.Calibration, steps: int) -> dict[str, torch.Tensor]:
    """The method without anything that makes it quick: whole parameters, the model's own forward, plain autograd.

    For a Mamba2 model whose state is cut. Returns the trained rows by parameter.
    """
    model, allowed = copy.deepcopy(model), cut_elements(model, plan)
    training, held = data.tokens[:-1], data.tokens[-1:]
    dense = copy.deepcopy(model)
    graph = sspruner.trace(model)
    mask(model, plan, graph)
    assert graph.blocks == "backbone.layers"
    streams = [model.backbone.embeddings(window[None]).detach() for window in [*training, *held]]
    trained = {}
    for number, block in enumerate(model.backbone.layers):
        for p in model.parameters():
            p.requires_grad_(False)
        path = f"backbone.layers.{number}.mixer"
        leaves = {n: p.requires_grad_() for n, p in block.mixer.named_parameters() if allowed[f"{path}.{n}"].any()}
        inputs = [block.norm(h.to(block.norm.weight.dtype)) for h in streams]
        targets = [dense.backbone.layers[number].mixer(u).detach() for u in inputs]
        energy = sum(float(t.double().square().sum()) for t in targets[:-1])
        adam = torch.optim.Adam(leaves.values(), lr=1e-2)
        generator, order = torch.Generator().manual_seed(data.seed), []
        checked = [checkpoint(block.mixer, inputs[-1], targets[-1], leaves)]
        for step in range(steps):
            order = order or torch.randperm(len(training), generator=generator).tolist()
            window = order.pop()
            adam.param_groups[0]["lr"] = 1e-2 * min(
                (step + 1) / max(1, steps / 20), (1 + math.cos(math.pi * step / steps)) / 2
            )
            loss = (block.mixer(inputs[window]) - targets[window]).square().sum() * len(training) / energy
            adam.zero_grad()
            loss.backward()
            for name, p in leaves.items():
                p.grad *= allowed[f"{path}.{name}"]
            adam.step()
            if (step + 1) % max(1, steps // 8) == 0 or step + 1 == steps:
                checked.append(checkpoint(block.mixer, inputs[-1], targets[-1], leaves))
        kept = min(checked, key=lambda found: found[0])[1]
        with torch.no_grad():
            for name, p in leaves.items():
                p.copy_(kept[name])
                trained[f"{path}.{name}"] = kept[name]
            streams = [block(h) for h in streams]
    return trained


@pytest.mark.parametrize("groups", [1, 2])
def test_it_is_the_method_as_written(groups, monkeypatch):
    """Without own text, which leaves the last of eight windows held out."""
    monkeypatch.setattr(refitting, "own_text", lambda *_: None)
    model = tiny_model(groups=groups)
    plan, data = half_plan(model, "state"), windows()
    found = reconstructed(model, plan, data, Reconstruction(refit_steps=16, refit_windows=8)).plan.updates
    oracle, allowed = plainly(model, plan, data, 16), cut_elements(model, plan)
    assert found
    before = model.state_dict()
    for name, value in oracle.items():
        rows = allowed[name]
        got = found.get(name, before[name])[rows]
        assert (value[rows] - before[name][rows]).abs().max() > 1e-3  # it has moved
        assert torch.allclose(got, value[rows], atol=1e-4), name


@pytest.mark.cover
@pytest.mark.parametrize("family", MAMBA2)
def test_a_projected_state_is_trained_and_stays_a_projection(family):
    model = zoo(family)
    plan = directions(half_plan(model, "state"), sspruner.trace(model), 3)
    found = reconstructed(model, plan, settings=Reconstruction(refit_steps=16, refit_windows=8))
    better = found.plan.groups
    assert any(better[name] != plan.groups[name] for name in better)
    for name, projection in better.items():
        eye = torch.eye(projection.after).expand(projection.sets, -1, -1)
        assert torch.allclose(projection.encode @ projection.decode, eye, atol=1e-4), name
    assert all(after <= before for before, after in found.errors.values())
    everything = sspruner.Plan({n: selection(r.sets, r.before, r.before, 0) for n, r in plan.groups.items()})
    allowed = cut_elements(model, everything)  # the rows of B and C
    for name, value in found.plan.updates.items():
        moved = value != model.state_dict()[name]
        assert moved.any()
        assert not (moved & ~allowed[name]).any(), name
    masked_equals_sliced(model, found.plan)


@pytest.mark.slow
@given(seed=st.integers(0, 99), axes=st.sampled_from([("state", "head"), ("state", "mlp"), ("head_dim", "attn_head")]))
@examples(3)
def test_several_axes_at_once(seed, axes):
    model = zoo("zamba2")
    plan = sspruner.Plan({n: r for axis in axes for n, r in half_plan(model, axis, seed).groups.items()})
    found, allowed = reconstructed(model, plan), cut_elements(model, plan)
    for name, value in found.plan.updates.items():
        assert not ((value != model.state_dict()[name]) & ~allowed[name]).any()
    assert all(after <= before for before, after in found.errors.values())


@given(more=st.integers(1, 6), seed=st.integers(0, 99), family=st.sampled_from(["", "granitemoehybrid"]))
@example(more=3, seed=0, family="granitemoehybrid")  # whose padding puts something out
@example(more=3, seed=0, family="qwen3_5_moe_text")  # whose shared expert is given all tokens in a row
@examples(3)
def test_padding_changes_nothing(more, seed, family):
    axis, model = ("mlp", zoo(family)) if family else ("state", tiny_model())
    ids, mask = tokens(8, 12, seed=seed), torch.ones(8, 12, dtype=torch.bool)
    mask[::3, 9:] = False
    wider = torch.cat([ids, tokens(8, more, seed=seed + 1)], 1)
    wide = torch.cat([mask, torch.zeros(8, more, dtype=torch.bool)], 1)
    plan = half_plan(model, axis)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refitting, "own_text", lambda *_: tokens(1, 12, seed=7))
        first, second = (reconstructed(model, plan, calibrated(*pair)) for pair in ((ids, mask), (wider, wide)))
    assert first.plan.updates
    for name, value in first.plan.updates.items():
        assert torch.allclose(value, second.plan.updates[name], atol=1e-4), name


def test_held_out_windows_are_not_trained_on(monkeypatch):
    """Other text in their place changes what is kept, and not what is learned."""
    monkeypatch.setattr(refitting, "own_text", lambda *_: None)
    monkeypatch.setattr(fitting, "CHECKS", 1)  # the last step is kept, or none
    model, data = tiny_model(), windows()
    plan = half_plan(model, "state")
    first = reconstructed(model, plan, data, Reconstruction(refit_steps=8, refit_windows=8))
    other = data.tokens.clone()
    other[-1] = data.tokens[0]
    second = reconstructed(model, plan, calibrated(other), Reconstruction(refit_steps=8, refit_windows=8))
    name = "backbone.layers.0.mixer.in_proj.weight"
    assert {found.layers["backbone.layers.0.mixer"].step for found in (first, second)} == {8}
    assert torch.equal(first.plan.updates[name], second.plan.updates[name])


def test_a_loss_that_is_not_finite_stops_its_layer(monkeypatch):
    model, calls = tiny_model(), iter(range(1000))
    real = fitting._take_step

    def failing(student: Any, lesson: Any, number: int, leaves: dict[str, torch.Tensor], *rest: Any) -> bool:
        if next(calls) == 4:
            next(iter(leaves.values())).data.fill_(torch.nan)
        return real(student, lesson, number, leaves, *rest)

    monkeypatch.setattr(fitting, "_take_step", failing)
    found = reconstructed(model, half_plan(model, "state"), settings=Reconstruction(refit_steps=16, refit_windows=8))
    first, second = found.layers.values()
    assert (first.stopped, first.steps) == ("the loss is not finite", 4)
    assert first.step in (2, 4)
    assert (second.stopped, second.steps) == ("", 16)
    assert all(value.isfinite().all() for value in found.plan.updates.values())


def test_time_ends_every_layer_at_its_share(monkeypatch):
    model = tiny_model()
    settings = Reconstruction(refit_steps=16, refit_windows=8, refit_minutes=1e-9)
    found = reconstructed(model, half_plan(model, "state"), settings=settings)
    assert [(layer.stopped, layer.steps) for layer in found.layers.values()] == [("the time is over", 1)] * 2


@pytest.mark.parametrize("axis", ["hidden", "block", "weight"])
def test_axes_without_a_dense_module_to_compare_with_are_refused(axis):
    model = tiny_model(layers=3)
    with pytest.raises(sspruner.InputError, match=f"refit reconstruct, axis {axis}: "):
        sspruner.prune(model, "magnitude", axis=axis, sparsity=0.5, refit="reconstruct", calibration=windows())


def test_too_little_text_is_refused_with_the_number_needed():
    model = tiny_model(groups=2, heads_per_group=4, head_dim=8)  # 32 columns
    with pytest.raises(sspruner.InputError, match=r"24 calibration tokens for 32 unknowns .* give 3 sequences or more"):
        reconstructed(model, half_plan(model, "state"), windows(2, 12))
    with pytest.raises(sspruner.InputError, match="1 calibration sequences; it wants 2 or more"):
        reconstructed(model, half_plan(model, "state"), windows(1, 64))


@pytest.mark.ci_cover(families=6)
@pytest.mark.cover(most=4)
@pytest.mark.parametrize(("family", "axis"), CASES)
def test_gradients_are_those_of_the_models_own_code(family, axis):
    """Constant products, quick scans and rows of their own against plain autograd through whole parameters."""
    model = zoo(family)
    plan, seen = half_plan(model, axis), []

    @torch.enable_grad()
    def compared(student: Student, lesson: Any, *_: Any, **__: Any) -> fitting.Fitted:
        number, call = next(iter(lesson.calls.items()))
        values = {name: value.clone().requires_grad_() for name, value in student.values.items()}
        parameters = dict(student.module.named_parameters())
        whole = {name: parameters[name].detach().clone().requires_grad_() for name in student.trained.elements}
        weights = torch.randn(lesson.targets[number].shape, generator=torch.Generator().manual_seed(0))
        for _ in range(2):  # the second time, from the store
            out = student(number, call, values)
        with undone(student.module):
            plain = output(student.module, call, whole)
        assert torch.allclose(out, plain, atol=1e-4)
        found = torch.autograd.grad((out * weights).sum(), [*values.values()], allow_unused=True)
        expected = torch.autograd.grad((plain * weights).sum(), [*whole.values()], allow_unused=True)
        for name, one, other in zip(values, found, expected, strict=True):
            assert (one is None) == (other is None), name
            if other is not None:
                rows = student.rows.get(name)
                kept = student.trained.elements[name] if rows is None else torch.ones_like(one, dtype=torch.bool)
                other = other if rows is None else other[rows]
                assert (one[kept] - other[kept]).norm() <= 0.01 * other[kept].norm() + 1e-6, name
                seen.append(name)
        return fitting.Fitted(None, {"text": (1.0, 1.0)})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstructing, "fit", compared)
        reconstructed(model, plan)
    assert seen


@contextmanager
def undone(module: Any) -> Iterator[None]:
    """The scans of the family's own code, inside `quick_scans`."""
    code = sys.modules[type(module).__module__]
    with pytest.MonkeyPatch.context() as patch:
        for name in quick_scan.SCANS:
            scan = getattr(code, name, None)
            while isinstance(scan, partial):  # one for the streams, one for what is trained
                scan = scan.args[0]
                patch.setattr(code, name, scan)
        yield


@torch.no_grad()
def own_errors(model: Any, plan: sspruner.Plan, ids: torch.Tensor) -> dict[str, float]:
    """Of each cut module of the masked model: squared error of its output over the energy of the dense module's."""
    paths, seen = {name.rpartition(":")[0] for name in plan.groups}, {}
    dense = copy.deepcopy(model)

    def look(path: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, out: Any) -> None:
            seen[path] = args, kwargs, out[0] if isinstance(out, tuple) else out

        return hook

    with sspruner.masked(model, plan):
        handles = [model.get_submodule(path).register_forward_hook(look(path), with_kwargs=True) for path in paths]
        model(input_ids=ids, use_cache=False)
        for handle in handles:
            handle.remove()
    errors = {}
    for path, (args, kwargs, cut) in seen.items():
        out = dense.get_submodule(path)(*args, **kwargs)
        whole = out[0] if isinstance(out, tuple) else out
        errors[path] = float((cut - whole).double().square().sum() / whole.double().square().sum())
    return errors


@pytest.mark.parametrize(
    ("family", "axis", "projected"),
    [("mamba2", "state", True), ("falcon_h1", "state", True), ("bamba", "head", False), ("mamba", "channel", False)],
)
def test_the_errors_are_those_of_the_masked_model(family, axis, projected, monkeypatch):
    monkeypatch.setattr(refitting, "own_text", lambda *_: None)
    model, data = zoo(family), windows()
    plan = half_plan(model, axis)
    plan = directions(plan, sspruner.trace(model), 3) if projected else plan
    found = reconstructed(model, plan, data, Reconstruction(refit_steps=16, refit_windows=8))
    actual = own_errors(model, found.plan, data.tokens[-1:])
    assert any(layer.step for layer in found.layers.values())
    for path, layer in found.layers.items():
        assert layer.held_out["text"][1] == pytest.approx(actual[path], rel=1e-3, abs=1e-7), path


@pytest.mark.slow
def test_prune_says_what_it_did(tmp_path):
    """In the report, the table, the card and the page; scores and held-out text are those without a refit."""
    model, ids = tiny_model(groups=2), tokens(24, 12)
    how = {"scorer": "magnitude", "keep": 3, "calibration": ids, "samples": 6}
    plain = sspruner.prune(copy.deepcopy(model), **how)
    result = sspruner.prune(model, refit="reconstruct", refit_steps=8, refit_windows=16, **how)
    report = result.report
    assert report.refit["kind"] == "reconstruct"
    assert report.refit["without"] == {
        name: plain.report.pruned[name] for name in ("perplexity", "perplexity_ratio", "kl_to_dense")
    }
    assert report.calibration == plain.report.calibration
    for layer in report.refit["layers"].values():
        assert (layer["steps"], layer["stopped"], set(layer["held_out"])) == (8, "", {"text", "own text"})
        assert layer["seconds"] > 0
    assert type(report).from_json(report.to_json()).to_json() == report.to_json()
    folder = tmp_path / "out"
    result.save(folder)
    changed = sum(layer["step"] > 0 for layer in report.refit["layers"].values())
    before, after = (sum(pair[i] for pair in report.refit["errors"].values()) / 2 for i in range(2))
    shown, card = str(result), (folder / "README.md").read_text()
    assert f"mean error of a layer on held-out text {before:.4f} -> {after:.4f}" in shown
    assert f"{changed} of 2 layers have new values" in shown
    assert f"{before:.4f} → {after:.4f} of its energy; {changed} of 2 layers changed" in card
    page = sspruner.report(folder).read_text()
    assert "Error of each layer before and after refit reconstruct" in page
    assert "step kept" in page


def test_weights_made_in_inference_mode_are_refused():
    with torch.inference_mode():
        model = tiny_model()
        with pytest.raises(sspruner.ModelError, match=r"made under torch\.inference_mode\(\)"):
            sspruner.prune(model, "magnitude", keep=3, refit="reconstruct", calibration=windows())
    model = tiny_model()
    with torch.inference_mode(), torch.no_grad():  # called there, of weights made elsewhere
        found = reconstructed(model, half_plan(model, "state"))
    assert found.plan.updates
