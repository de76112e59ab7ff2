"""The axes of single elements from the graph to a pruned model: which tensors, their inputs, budgets, mixed axes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import nn

import sspruner
from sspruner.calibrate.replay import Replay
from sspruner.compute.products import Products
from sspruner.graph.elements import element_groups
from sspruner.plans.plan import Plan
from sspruner.plans.reduction import Selection
from sspruner.surgery.mask import dropped, is_masked
from support.examples import examples
from support.family_plans import DELTA, KDA
from support.scoring import batches_of, calibrated, importance
from support.tiny import half, logits, tiny_model, tokens
from support.zoo import FAMILIES, zoo, zoo_models

MAMBA1 = ("mamba", "falcon_mamba", "jamba")
MASK = torch.arange(19) < torch.tensor([19, 11, 5])[:, None]
IDS = tokens(3, 19)


# The graph


def check_elements(model: nn.Module) -> None:
    graph = sspruner.trace(model)
    inside, outside = {}, set()
    for path, module in model.named_modules(remove_duplicate=False):
        own = {} if isinstance(module, nn.Linear) else dict(module.named_parameters(recurse=False))
        outside |= {id(p) for name, p in own.items() if name != "A_log" or p.ndim == 1}
        if isinstance(module, nn.Linear):
            if path.startswith(f"{graph.blocks}."):
                inside.setdefault(id(module.weight), path)
            else:
                outside.add(id(module.weight))
            outside |= {id(module.bias)} if module.bias is not None else set()
    weights = graph.on_axis("weight")
    assert {id(model.get_parameter(g.tensor)) for g in weights.values()} == set(inside)
    assert len(weights) == len(inside)  # a shared one once
    for name, group in graph.elements.items():
        tensor = model.get_parameter(group.tensor)
        assert id(tensor) not in outside
        assert (group.groups, group.units) == tensor.shape
        assert name == group.name == f"{group.layer}:{group.axis}"
        assert group.members == ()
        expected = f"{group.layer}.weight" if group.axis == "weight" else f"{group.layer}.A_log"
        assert group.tensor == expected
        if group.axis == "weight":
            assert inside[id(tensor)] == group.layer  # by the first of its names
    assert not set(graph.elements) & set(graph.groups)
    assert not {"weight", "decay"} & set(graph.axes)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_inside_the_blocks_once(family: str) -> None:
    """Never embeddings, the head, convolutions, norms, D, biases, Mamba2's A_log, stacked experts."""
    model = zoo(family)
    check_elements(model)
    graph = sspruner.trace(model)
    decays = [g for g in graph.elements.values() if g.axis == "decay"]
    assert len(decays) == (len(graph.layers) if family in MAMBA1 else 0)
    assert list(graph.elements) == list(element_groups(model, list(graph.sites), graph.blocks))


@examples(20)
@given(zoo_models())
def test_of_any_structure(model: nn.Module) -> None:
    check_elements(model)


def mixer_rows(mixer: Any) -> dict[str, tuple[str, list[int]]]:
    """The rows that make B and C, by the order in which the mixer's own forward splits them."""
    N = mixer.ssm_state_size
    if hasattr(mixer, "x_proj"):
        R = mixer.time_step_rank
        return {"B": ("x_proj", list(range(R, R + N))), "C": ("x_proj", list(range(R + N, R + 2 * N)))}
    D, GN = mixer.intermediate_size, mixer.n_groups * N
    return {"B": ("in_proj", list(range(2 * D, 2 * D + GN))), "C": ("in_proj", list(range(2 * D + GN, 2 * D + 2 * GN)))}


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("zamba", *DELTA, *KDA)])
def test_rows_of_b_and_c_are_the_ones_that_make_them(family: str) -> None:
    """By the mixer's code, and by the states that own them in the graph."""
    model = zoo(family)
    graph = sspruner.trace(model)
    assert graph.layers
    for site in graph.layers:
        mixer = model.get_submodule(site.path)
        states = graph.groups[f"{site.path}:state"]
        for run, (where, rows) in mixer_rows(mixer).items():
            group = graph.elements[f"{site.path}.{where}:weight"]
            assert group.runs[run].tolist() == rows
            (member,) = [m for m in states.members if m.rows == run and m.tensor == group.tensor]
            assert sorted(member.index.flatten().tolist()) == rows
        for name, group in graph.elements.items():
            if name.startswith(f"{site.path}.") and group.axis == "weight":
                runs = [set(rows.tolist()) for rows in (group.runs or {}).values()]
                assert not runs or set().union(*runs) == set(range(group.groups))
                assert sum(map(len, runs)) == (group.groups if runs else 0)  # no row twice


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_rows_of_b_change_b_and_nothing_else(family: str) -> None:
    """Measured: with those rows at zero, B is zero before its convolution, and x, z, C are what they were."""
    model = zoo(family, bias=False, conv_bias=False)
    graph = sspruner.trace(model)
    site = graph.layers[0]
    mixer = model.get_submodule(site.path)
    where, _ = mixer_rows(mixer)["B"]
    rows = graph.elements[f"{site.path}.{where}:weight"].runs["B"]
    hidden = torch.randn(2, 9, mixer.in_proj.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = site.family.project(mixer, hidden, torch.ones(2, 9, dtype=torch.bool))
        mixer.get_submodule(where).weight[rows] = 0
        after = site.family.project(mixer, hidden, torch.ones(2, 9, dtype=torch.bool))
    assert before.B.any()
    assert not after.B.any()
    for name in ("x", "z", "C", "dt"):
        assert torch.equal(getattr(before, name), getattr(after, name)), name


# What linear layers are given


@contextmanager
def hooked(model: nn.Module) -> Iterator[dict[str, list[torch.Tensor]]]:
    """The input of every linear layer that is called as a module, by all its paths."""
    seen: dict[str, list[torch.Tensor]] = {}
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            paths.setdefault(id(module.weight), []).append(path)

    def note(module: nn.Linear, args: tuple[torch.Tensor, ...]) -> None:
        seen.setdefault(paths[id(module.weight)][0], []).append(args[0].detach().clone())

    handles = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, nn.Linear)]
    yield seen
    for handle in handles:
        handle.remove()


class Inputs(sspruner.Scorer):
    """Keeps what it is shown, by module and tensor."""

    name, axes = "inputs", {"weight", "state", "channel", "head", "mlp", "attn_head"}
    seen: dict[str, list[torch.Tensor]]

    def observe(self, view: sspruner.SSMView) -> None:
        for key, value in view.inputs.items():
            assert value.dtype == torch.float32
            self.seen.setdefault(f"{view.group.layer}.{key}", []).append(value)
        if self.axis == "weight":
            assert set(view.inputs) == {"weight"}
            assert set(view.weights) == {"weight"}
            assert view.weights["weight"].shape == (view.group.groups, view.group.units, 1)
            assert view.hidden.shape[-1] == view.group.units
            assert torch.equal(view.norms, view.weights["weight"][..., 0].abs())
        self.shape = view.group.groups, view.group.units

    def importance(self) -> torch.Tensor:
        return torch.ones(self.shape)


def shown_inputs(model: nn.Module, axis: str | list[str]) -> dict[str, torch.Tensor]:
    """Parameter -> (all calls' tokens, in features), without padding."""
    scorer = type("Mine", (Inputs,), {"seen": {}})
    importance(model, IDS, scorer, axis=axis, mask=MASK)
    return {name: torch.cat(calls) for name, calls in scorer.seen.items()}


def expected_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """The same from hooks on the model itself, one sequence after the other, without padding; dt_proj by hand."""
    found: dict[str, list[torch.Tensor]] = {}
    for ids, mask in zip(IDS, MASK, strict=True):
        with hooked(model) as seen:
            logits(model, ids[mask][None])
        for path, calls in seen.items():
            found.setdefault(f"{path}.weight", []).append(torch.cat([x.reshape(-1, x.shape[-1]) for x in calls]))
        for site in sspruner.trace(model).layers:
            mixer = model.get_submodule(site.path)
            if hasattr(mixer, "dt_proj"):
                assert f"{site.path}.dt_proj" not in seen  # its weight is multiplied by hand
                (given,) = seen[f"{site.path}.x_proj"]
                dt = (given.double() @ mixer.x_proj.weight.detach().double().T)[..., : mixer.time_step_rank]
                if hasattr(mixer, "dt_layernorm"):  # jamba, and falcon_mamba without a weight
                    epsilon = getattr(mixer, "rms_eps", None) or mixer.dt_layernorm.variance_epsilon
                    dt = dt * (dt.square().mean(-1, keepdim=True) + epsilon).rsqrt()
                    own = dict(mixer.dt_layernorm.named_parameters())
                    dt = dt * own.get("weight", torch.ones(())).double()
                found.setdefault(f"{site.path}.dt_proj.weight", []).append(
                    dt.detach().reshape(-1, dt.shape[-1]).float()
                )
    return {name: torch.cat(calls) for name, calls in found.items()}


def equal_as_sets(one: torch.Tensor, other: torch.Tensor) -> None:
    """The same tokens, whatever the order of calls and sequences: equal second moments, sums, and counts."""
    assert one.shape == other.shape
    one, other = one.double(), other.double()
    scale = float(other.square().sum()) ** 0.5 + 1e-9
    torch.testing.assert_close(one.T @ one, other.T @ other, rtol=1e-3, atol=1e-4 * scale**2 / len(one))
    torch.testing.assert_close(one.sum(0), other.sum(0), rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.slow
@pytest.mark.cover
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [4096, 19])
def test_what_every_linear_layer_is_given(family: str, size: int) -> None:
    """On the axis weight, each by itself, and inside mixers, attention and MLPs; shared ones in all their layers."""
    model = zoo(family)
    expected = expected_inputs(model)
    with batches_of(size):
        found = shown_inputs(model, "weight")
        assert set(found) == {g.tensor for g in sspruner.trace(model).on_axis("weight").values()}
        for name, value in found.items():
            equal_as_sets(value, expected[name])
        axes = [axis for axis in sspruner.trace(model).axes if axis in Inputs.axes]
        around = [axis for axis in axes if axis in ("mlp", "attn_head")]
        inside = shown_inputs(model, axes[:1]) | (shown_inputs(model, around[:1]) if around else {})
        assert inside
        for name, value in inside.items():
            equal_as_sets(value, expected[name])


@pytest.mark.parametrize("family", MAMBA1)
def test_dt_proj_is_seen_token_by_token(family: str) -> None:
    """In the order of the tokens, where the order is known: one batch of one sequence."""
    model = zoo(family)
    expected = expected_inputs(model)
    scorer = type("Mine", (Inputs,), {"seen": {}})
    importance(model, IDS[:1], scorer, axis="state")
    names = [name for name in scorer.seen if name.endswith("dt_proj.weight")]
    assert len(names) == len(sspruner.trace(model).layers)
    for name in names:
        (value,) = scorer.seen[name]
        torch.testing.assert_close(value, expected[name][:19], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_no_linear_layer_is_called_twice_in_a_block() -> None:
    """What the replay relies on: a second call would be lost, or would end the run before the others are seen."""
    for family in FAMILIES:
        model = zoo(family)
        graph = sspruner.trace(model)
        for i in range(len(model.get_submodule(graph.blocks))):
            block, calls = model.get_submodule(f"{graph.blocks}.{i}"), []
            own = {m.weight: name for name, m in block.named_modules() if isinstance(m, nn.Linear)}
            watch = Products(own, lambda name, _, calls=calls: calls.append(name))
            handles = [
                block.register_forward_pre_hook(lambda *_, watch=watch: watch.__enter__() and None),
                block.register_forward_hook(lambda *_, watch=watch: watch.__exit__(None, None, None)),
            ]
            logits(model, IDS)
            for handle in handles:
                handle.remove()
            assert calls
            assert len(calls) == len(set(calls)), family


def test_products_in_every_spelling() -> None:
    linear, seen = nn.Linear(3, 5), []
    x = torch.randn(2, 7, 3)
    W, b = linear.weight, linear.bias
    other = nn.Linear(3, 5)
    with Products({W: "W"}, lambda name, value: seen.append((name, value))):
        results = [
            linear(x),
            nn.functional.linear(x, W, b),
            nn.functional.linear(x, weight=W, bias=b),
            nn.functional.linear(input=x, weight=W, bias=b),
            (W @ x.transpose(1, 2)).transpose(1, 2) + b,
            torch.matmul(W, x.transpose(1, 2)).transpose(1, 2) + b,
            W.matmul(x.transpose(1, 2)).transpose(1, 2) + b,
        ]
        other(x)
        x @ x.transpose(1, 2)
    for result in results:
        torch.testing.assert_close(result, results[0])
    assert [name for name, _ in seen] == ["W"] * len(results)
    assert all(torch.equal(value, x) for _, value in seen)


def test_a_module_that_never_runs() -> None:
    """A score of zero would be a lie: an error by name, and no error for scorers that need no activations."""
    model = tiny_model()
    model.backbone.layers[1].extra = nn.Linear(4, 4)
    for scorer in ("wanda", "sparsegpt"):
        with pytest.raises(sspruner.ModelError, match=r"layers\.1\.extra:weight: its module never ran on the cal"):
            importance(model, IDS, scorer, axis="weight")
    assert len(importance(model, IDS, "magnitude", axis="weight")) == 5
    found = importance(model, IDS, "taylor", axis="weight")
    assert not found["backbone.layers.1.extra:weight"].any()


def test_a_linear_layer_that_is_called_another_way_is_not_guessed() -> None:
    """Inside a mixer the engine says that it has not seen what a kernel multiplies by itself."""
    model = tiny_model()
    out_proj = model.backbone.layers[0].mixer.out_proj
    out_proj.forward = lambda x: torch.einsum("bti,oi->bto", x, out_proj.weight)
    with pytest.raises(sspruner.ModelError, match=r"layers\.0\.mixer: the inputs of out_proj were not seen"):
        importance(model, IDS, "wanda", axis="head")


# From end to end


def pruned(family: str, scorer: Any, **budget: Any) -> tuple[sspruner.Result, dict[str, torch.Tensor]]:
    """The result, and the dense parameters."""
    model = zoo(family)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    axis = budget.pop("axis", "weight")
    result = sspruner.prune(model, scorer, axis=axis, calibration=calibrated(IDS, MASK), **budget)
    return result, before


def check_zeros(result: sspruner.Result, before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the plan drops is zero, all else is what it was. Returns what stays, by tensor."""
    graph = sspruner.trace(result.model)
    keep = {graph.elements[n].tensor: k for n, k in result.plan.elements.items()}
    for name, parameter in result.model.named_parameters():
        assert torch.equal(parameter, before[name] * keep.get(name, torch.ones_like(before[name], dtype=torch.bool)))
    return keep


@pytest.mark.slow
@pytest.mark.cover
@pytest.mark.parametrize("one_shot", [False, True])
@pytest.mark.parametrize("scorer", ["magnitude", "random", "wanda"])
@pytest.mark.parametrize("family", ["mamba2", "mamba", "zamba2", "nemotron_h"])
def test_half_of_every_tensor(family: str, scorer: str, one_shot: bool) -> None:
    result, before = pruned(family, scorer, sparsity=0.5, one_shot=one_shot)
    keep = check_zeros(result, before)
    assert set(result.plan.elements) == set(sspruner.trace(result.model).on_axis("weight"))
    assert not result.plan.groups
    for name, stays in keep.items():
        if scorer == "wanda":  # within its rows
            assert set(stays.sum(1).tolist()) == {round(stays.shape[1] * 0.5)}
        else:
            assert int(stays.sum()) == round(stays.numel() * 0.5)
        score = result.scores.importance[name.removesuffix(".weight") + ":weight"]
        for row, stay in zip(score, stays, strict=True) if scorer == "wanda" else [(score, stays)]:
            assert row[stay].min() >= row[~stay].max()
    assert result.report.one_shot == one_shot


@pytest.mark.parametrize("scorer", ["magnitude", "wanda", "sparsegpt", "taylor"])
def test_two_of_every_four(scorer: str) -> None:
    result, before = pruned("mamba2", scorer, pattern="2:4")
    for stays in result.plan.elements.values():
        assert (stays.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    assert len(result.plan.elements) == 6
    assert result.report.budget["pattern"] == "2:4"
    if scorer != "sparsegpt":
        check_zeros(result, before)


@pytest.mark.slow
@pytest.mark.parametrize("scorer", ["magnitude", "gradmag", "wanda"])
def test_all_tensors_together(scorer: str) -> None:
    result, before = pruned("mamba", scorer, sparsity=0.6, granularity="global")
    keep = check_zeros(result, before)
    assert result.report.one_shot
    assert sum(int(k.sum()) for k in keep.values()) == round(sum(k.numel() for k in keep.values()) * 0.4)
    score = {f"{n.rpartition(':')[0]}.weight": s for n, s in result.scores.importance.items()}
    assert min(float(score[n][k].min()) for n, k in keep.items()) >= max(
        float(score[n][~k].max()) for n, k in keep.items()
    )
    assert len({round(float(k.float().mean()), 3) for k in keep.values()}) > 5


@pytest.mark.cover(most=2)
@pytest.mark.parametrize("family", ["mamba2", "mamba", "zamba2", "jamba"])
def test_rows_of_b_and_c_alone(family: str) -> None:
    result, before = pruned(family, "magnitude", sparsity=0.5, rows=["B", "C"])
    keep = check_zeros(result, before)
    expected = {}
    for site in sspruner.trace(result.model).layers:
        runs = mixer_rows(result.model.get_submodule(site.path))
        (where,) = {where for where, _ in runs.values()}
        expected[f"{site.path}.{where}.weight"] = sorted(row for _, rows in runs.values() for row in rows)
    assert set(keep) == set(expected)
    for name, rows in expected.items():
        others = [row for row in range(len(keep[name])) if row not in rows]
        assert keep[name][others].all()
        assert int(keep[name][rows].sum()) == round(keep[name][rows].numel() * 0.5)


def test_decay_through_prune() -> None:
    """A zero in A_log, per tensor and over all of them."""
    result, before = pruned("mamba", "magnitude", axis="decay", sparsity=0.25)
    keep = check_zeros(result, before)
    assert sorted(keep) == [f"backbone.layers.{i}.mixer.A_log" for i in range(3)]
    assert {int((~k).sum()) for k in keep.values()} == {24}
    result, before = pruned("falcon_mamba", "snip", axis={"decay": 0.25, "weight": 0.5})
    keep = check_zeros(result, before)
    decays = [k for n, k in keep.items() if n.endswith("A_log")]
    assert sum(int((~k).sum()) for k in decays) == 72


@pytest.mark.slow
def test_a_shared_linear_layer_is_pruned_once_and_after_its_last_call() -> None:
    """By its inputs in all layers that call it; cut only when the last of them has been seen."""
    result, before = pruned("zamba2", "wanda", sparsity=0.5)
    check_zeros(result, before)
    shared = [n for n in result.plan.elements if "shared_transformer.self_attn.q_proj" in n]
    assert len(shared) == 2  # two blocks, for three layers
    dense = zoo("zamba2")
    first = importance(dense, IDS, "wanda", axis="weight", mask=MASK)
    for name in shared:  # inputs of the first layer are dense in the first block, so only later ones differ
        assert result.scores.importance[name].shape == first[name].shape


# Several axes


def test_states_and_single_weights_in_one_plan() -> None:
    model = zoo("mamba2")
    dense = copy.deepcopy(model)
    scorers, axes = {"state": "ghost", "weight": "wanda"}, {"state": 0.5, "weight": 0.5}
    result = sspruner.prune(model, scorers, axis=axes, calibration=calibrated(IDS, MASK))
    graph = sspruner.trace(dense)
    assert set(result.plan.groups) == set(graph.on_axis("state"))
    assert set(result.plan.elements) == set(graph.on_axis("weight"))
    assert {g.units for g in sspruner.trace(model).on_axis("state").values()} == {3}
    with sspruner.masked(dense, result.plan):
        expected = logits(dense, IDS)
    torch.testing.assert_close(logits(model, IDS), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert (result.report.scorer, result.report.axis) == ("ghost, wanda", "state, weight")
    assert set(result.report.layers) == set(graph.on_axis("state"))
    alone = importance(dense, IDS, "wanda", axis="weight", mask=MASK)
    for name in ("in_proj", "out_proj"):  # the first layer's inputs are the dense ones, and its states not yet cut
        name = f"backbone.layers.0.mixer.{name}:weight"
        torch.testing.assert_close(result.scores.importance[name], alone[name])


def test_both_axes_of_elements_with_a_budget_for_each() -> None:
    result, before = pruned("mamba", "magnitude", axis={"weight": 0.25, "decay": 0.5, "channel": 0.25})
    assert set(result.plan.axes) == {"channel", "weight", "decay"}
    for name, stays in result.plan.elements.items():
        share = 0.5 if name.endswith(":decay") else 0.75
        assert int(stays.sum()) == round(stays.numel() * share)
    assert {s.after for s in result.plan.groups.values()} == {12}
    assert before


@pytest.mark.parametrize("family", ["mamba2", "mamba"])
def test_new_weights_do_not_revive_what_is_dropped_beside_them(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a sequential walk goes on: a layer whose states are masked is also one whose weights are new."""
    model, ids = zoo(family), tokens(6, 19)
    dense = copy.deepcopy(model)
    graph, during, right = sspruner.trace(model), {}, Replay.advance

    def advance(self: Replay, block: str) -> None:
        during[block] = {n: p.detach().clone() for n, p in model.named_parameters() if n.startswith(f"{block}.")}
        right(self, block)

    monkeypatch.setattr(Replay, "advance", advance)
    scorers, axes = {"state": "ghost", "weight": "sparsegpt"}, {"state": 0.5, "weight": 0.5}
    result = sspruner.prune(model, scorers, axis=axes, calibration=calibrated(ids), mode="mask")
    blocks = [f"{graph.blocks}.{i}" for i in range(3)]
    assert list(during) == blocks[:2]
    for tensors in during.values():
        for name, values in tensors.items():
            if ".mixer." not in name:
                continue
            stays = result.plan.elements.get(f"{name.removesuffix('.weight')}:weight")
            expected = result.plan.updates.get(name, dense.get_parameter(name).detach()).clone()
            if stays is not None:
                assert name in result.plan.updates
                expected = expected * stays
            group = graph.groups[f"{name.partition('.mixer')[0]}.mixer:state"]
            for tensor, dims, rows, _ in dropped(group, result.plan.groups[group.name], dense):
                if tensor == name:
                    expected.movedim(dims, tuple(range(len(dims))))[rows] = 0
                    assert not values.movedim(dims, tuple(range(len(dims))))[rows].any()
            torch.testing.assert_close(values, expected, rtol=0, atol=0)
            assert torch.equal(values, model.get_parameter(name))  # and so it is in the end
    assert is_masked(model)
    sspruner.unmask(model)
    assert all(torch.equal(p, dense.get_parameter(n)) for n, p in model.named_parameters())


@pytest.mark.parametrize("one_shot", [False, True])
def test_two_scorers_that_change_the_same_tensor(one_shot: bool) -> None:
    model = zoo("mamba2")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    says = r"layers\.0\.mixer\.out_proj\.bias: changed by the scorers of two axes; prune one after the other"
    with pytest.raises(sspruner.InputError, match=says):
        sspruner.prune(
            model, "flap", axis={"head": 0.5, "head_dim": 0.5}, calibration=calibrated(IDS), one_shot=one_shot
        )
    assert not is_masked(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


# What a scorer's `reduce` may not do


class Reducing(sspruner.Scorer):
    """Keeps the best, and gives out_proj another bias."""

    name, axes, needs = "reducing", {"head", "weight"}, "weights"

    def observe(self, view: sspruner.SSMView) -> None:
        self.scores = view.norms
        self.key = "weight" if self.axis == "weight" else "out_proj.weight"
        self.value = view.tensor(self.key) * 2

    def importance(self) -> torch.Tensor:
        return self.scores

    def reduce(self, choose: Any) -> Any:
        return self.changed(choose(self.importance()), {self.key: self.value})

    def changed(self, keep: torch.Tensor, updates: dict[str, torch.Tensor]) -> Any:
        return keep, updates


def none_more(keep: torch.Tensor) -> torch.Tensor:
    keep = keep.clone()
    keep[0, int((~keep[0]).nonzero()[0])] = True
    return keep


WRONG = {
    "no pair": (lambda keep, new: keep, "reduce returned no bool tensor"),
    "nothing at all": (lambda keep, new: None, "failed: TypeError"),
    "three": (lambda keep, new: (keep, new, 1), "failed: ValueError"),
    "no dict": (lambda keep, new: (keep, list(new)), "reduce returned new values as list, not by name in a dict"),
    "a number as key": (lambda keep, new: (keep, {3: keep.float()}), "not by name in a dict"),
    "no tensor": (lambda keep, new: (keep.tolist(), new), r"reduce returned no bool tensor of shape \(2, 2\)"),
    "numbers": (lambda keep, new: (keep.float(), new), "reduce returned no bool tensor"),
    "turned": (lambda keep, new: (keep.flatten()[None], new), "reduce returned no bool tensor"),
    "one row": (lambda keep, new: (keep[:1], new), "reduce returned no bool tensor"),
    "one more": (lambda keep, new: (none_more(keep), new), r"reduce keeps \[2, 1\] units in its sets, not \[1, 1\]"),
    "all": (lambda keep, new: (keep | True, new), r"reduce keeps \[2, 2\] units"),
    "nothing": (lambda keep, new: (keep & False, new), r"reduce keeps \[0, 0\] units"),
    "nan": (lambda keep, new: (keep, {n: v * torch.nan for n, v in new.items()}), "out_proj.weight is not a finite"),
    "a list as value": (lambda keep, new: (keep, {n: v.tolist() for n, v in new.items()}), "not a finite tensor"),
    "whole numbers": (lambda keep, new: (keep, {n: v.int() for n, v in new.items()}), "out_proj.weight"),
    "another shape": (lambda keep, new: (keep, {n: v[:1] for n, v in new.items()}), "out_proj.weight"),
    "unknown": (lambda keep, new: (keep, {"outproj.weight": new["out_proj.weight"]}), "outproj.weight"),
    "rows of one": (lambda keep, new: (keep, {"in_proj.weight:B": keep.float()}), "in_proj.weight:B"),
    "a bias of no linear layer": (lambda keep, new: (keep, {"norm.bias": keep.float()}), "norm.bias"),
    "too large for its type": (lambda keep, new: (keep, {n: v * 1e39 for n, v in new.items()}), "out_proj.weight"),
}


@pytest.mark.cover(most=8)
@pytest.mark.parametrize("one_shot", [False, True])
@pytest.mark.parametrize("case", WRONG)
def test_a_broken_reduce_is_named_in_one_line(case: str, one_shot: bool) -> None:
    change, says = WRONG[case]
    scorer = type("Broken", (Reducing,), {"name": "broken", "changed": lambda self, keep, new: change(keep, new)})
    model = zoo("mamba2", bias=False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(sspruner.SSPrunerError, match=says) as error:
        sspruner.prune(model, scorer, axis="head", sparsity=0.5, calibration=calibrated(IDS), one_shot=one_shot)
    assert "scorer 'broken' on backbone.layers.0.mixer:head" in str(error.value)
    assert "\n" not in str(error.value)
    assert not is_masked(model)
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("one_shot", [False, True])
@pytest.mark.parametrize("axis", ["head", "weight"])
def test_a_reduce_that_is_right(axis: str, one_shot: bool) -> None:
    model = zoo("mamba2")
    dense = copy.deepcopy(model)
    result = sspruner.prune(
        model, Reducing, axis=axis, sparsity=0.5, calibration=calibrated(IDS), one_shot=one_shot, mode="mask"
    )
    changed = ("out_proj",) if axis == "head" else ("in_proj", "out_proj")
    assert set(result.plan.updates) == {f"backbone.layers.{i}.mixer.{n}.weight" for i in range(3) for n in changed}
    for name, value in result.plan.updates.items():
        torch.testing.assert_close(value, 2 * dense.get_parameter(name).detach())


def test_a_reduce_of_elements_may_keep_other_counts() -> None:
    """Single elements: any mask will do."""
    keeps = type("One", (Reducing,), {"changed": lambda self, keep, new: (none_more(keep & (keep.cumsum(1) < 3)), {})})
    result, before = pruned("mamba2", keeps, sparsity=0.5)
    check_zeros(result, before)
    assert all(k[0].sum() <= 3 and k[1:].sum(1).amax() <= 2 for k in result.plan.elements.values())
    asked = pruned("mamba2", "magnitude", sparsity=0.5)[0].plan.elements
    assert all(k.sum() < asked[n].sum() for n, k in result.plan.elements.items())


def test_plans_of_elements_beside_units_are_masked_and_sliced_alike() -> None:
    """Of the shape that a mixed prune makes, by hand."""
    model = zoo("mamba2")
    graph = sspruner.trace(model)
    name = "backbone.layers.1.mixer.in_proj:weight"
    keep = torch.ones(60, 8, dtype=torch.bool)
    keep[:, ::2] = False
    plan = Plan({**half(graph).groups, "backbone:hidden": Selection(8, (tuple(range(6)),))}, elements={name: keep})
    masked = logits(sspruner.apply(copy.deepcopy(model), plan, mode="mask"), IDS)
    torch.testing.assert_close(logits(sspruner.apply(model, plan), IDS), masked, rtol=1e-3, atol=1e-3)


def test_a_saved_model_holds_the_scores_of_units_but_not_of_elements(tmp_path: Path) -> None:
    model = tiny_model()
    result = sspruner.prune(model, "magnitude", axis={"state": 0.5, "weight": 0.5}, calibration=tokens(4, 16))
    assert any(name.endswith(":weight") for name in result.scores.importance)
    sspruner.save(result.model, tmp_path / "both", result=result)
    saved = sspruner.Scores.load(tmp_path / "both" / "sspruner" / "scores.safetensors").importance
    assert set(saved) == {name for name in result.scores.importance if name.endswith(":state")}
    result = sspruner.prune(tiny_model(), "magnitude", axis="weight", calibration=tokens(4, 16))
    sspruner.save(result.model, tmp_path / "elements", result=result)
    assert not (tmp_path / "elements" / "sspruner" / "scores.safetensors").exists()
