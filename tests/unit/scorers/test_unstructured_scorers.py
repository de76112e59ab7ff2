"""Wanda, SNIP and gradient-aware magnitude: against plain loops, hooks and autograd on a copy of the model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import sspruner
from sspruner.graph.group import DependencyGroup
from sspruner.scoring.known import find_scorer
from sspruner.surgery.mask import mask_group, unmask
from sspruner_plugins.gradmag import GradMag
from sspruner_plugins.snip import Snip
from sspruner_plugins.wanda import Wanda
from support.linear_views import linear_view
from support.scoring import batches_of, calibrated, importance, without
from support.tiny import models, tiny_model, tokens
from support.zoo import FAMILIES, zoo

FP32 = (torch.float32,)
FAMILY = ["mamba2", "mamba", "zamba2", "jamba", "nemotron_h"]  # between them every kind of site


def padded(batch: int = 3, length: int = 19) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, and a mask that leaves out the end of some rows."""
    mask = torch.arange(length) < torch.tensor([length, 11, 5])[:batch, None]
    return tokens(batch, length), mask


@torch.no_grad()
def linear_inputs(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """What every linear layer is given, sequence by sequence, without padding: its weight's name -> (tokens, in).

    Mamba1's code multiplies by dt_proj's weight itself: what that is given is read off behind x_proj, or Jamba's norm.
    """
    seen: dict[str, list[torch.Tensor]] = {}
    names = {id(p): name for name, p in model.named_parameters()}  # of a shared one the first
    handles = []

    def watch(module: nn.Module, name: str, rank: int | None = None) -> None:
        def hook(module: nn.Module, args: tuple[torch.Tensor], out: torch.Tensor) -> None:
            x = args[0] if rank is None else out[..., :rank]
            seen.setdefault(name, []).append(x.reshape(-1, x.shape[-1]).double())

        handles.append(module.register_forward_hook(hook))

    for name, module in model.named_modules():
        mixer, _, leaf = name.rpartition(".")
        if isinstance(module, nn.Linear) and leaf != "dt_proj":
            watch(module, names[id(module.weight)])
        elif leaf == "dt_proj":
            owner = model.get_submodule(mixer)
            behind = getattr(owner, "dt_layernorm", owner.x_proj)
            watch(behind, names[id(module.weight)], module.in_features)
    for row, counted in zip(ids, mask, strict=True):
        model(input_ids=row[counted][None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(calls) for name, calls in seen.items()}


def reference_wanda(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """|W| times the root mean square of the input, for every linear layer: fp64, by the weight's name."""
    parameters = dict(model.named_parameters())
    rms = {name: x.square().mean(0).sqrt() for name, x in linear_inputs(model, ids, mask).items()}
    return {name: parameters[name].detach().double().abs() * size for name, size in rms.items()}


@torch.no_grad()
def reference_experts(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, idle: float) -> dict[str, torch.Tensor]:
    """|W| times the root mean square of what each expert reads, by hooks and expert by expert: fp64 (E, out, in).

    idle: the size of the input of an expert that gets no token.
    """
    calls: dict[str, list[Any]] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: calls.setdefault(name, []).append(args))
        for name, module in model.named_modules()
        if isinstance(getattr(module, "down_proj", None), nn.Parameter)
    ]
    for row, counted in zip(ids, mask, strict=True):
        model(input_ids=row[counted][None], use_cache=False)
    for handle in handles:
        handle.remove()
    sizes = {}
    for name, seen in calls.items():
        module = model.get_submodule(name)
        hidden, chosen, _ = (torch.cat(parts) for parts in zip(*seen, strict=True))
        gated = hasattr(module, "gate_up_proj")
        up = "gate_up_proj" if gated else "up_proj"
        read: dict[str, list[torch.Tensor]] = {up: [], "down_proj": []}
        for e in range(len(module.down_proj)):
            x = hidden[(chosen == e).any(-1)]
            rows = x @ getattr(module, up)[e].T
            inner = module.act_fn(rows.chunk(2, -1)[0]) * rows.chunk(2, -1)[1] if gated else module.act_fn(rows)
            for key, value in ((up, x), ("down_proj", inner)):
                some = value.double().square().mean(0).sqrt()
                read[key].append(some if len(x) else torch.full((value.shape[1],), idle, dtype=torch.float64))
        for key, rms in read.items():
            sizes[f"{name}.{key}"] = getattr(module, key).detach().double().abs() * torch.stack(rms)[:, None]
    return sizes


def reference_gradients(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Autograd on a copy, row by row, without the padding: gradient of the mean loss per predicted token."""
    copied = copy.deepcopy(model).float().requires_grad_(True)
    losses, count = [], 0
    for row, counted in zip(ids, mask, strict=True):
        kept = row[counted]
        logits = copied(input_ids=kept[None], use_cache=False).logits[0, :-1]
        losses.append(F.cross_entropy(logits, kept[1:], reduction="sum"))
        count += len(kept) - 1
    (torch.stack(losses).sum() / count).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in copied.named_parameters()}


def owned(model: nn.Module, group: DependencyGroup, g: int, u: int) -> dict[str, torch.Tensor]:
    """What one unit owns: the elements that its mask sets to zero. Needs a model without zeros."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    mask_group(model, group, without(group, g, u))
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    unmask(model)
    return {name: (before[name] != after[name]).nonzero() for name in before if not before[name].equal(after[name])}


def elements(tensors: dict[str, torch.Tensor], places: dict[str, torch.Tensor]) -> torch.Tensor:
    """The values at some places of some tensors, in one row; of tensors that are not there, none."""
    found = [tensors[name][tuple(at.T)].double() for name, at in places.items() if name in tensors]
    return torch.cat([torch.zeros(0, dtype=torch.float64), *found])


def some_units(group: DependencyGroup) -> list[tuple[int, int]]:
    return sorted({(0, 0), (0, group.units - 1), (group.groups - 1, group.units // 2)})


# Wanda


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 99), st.data())
def test_wanda_is_the_weight_times_the_norm_of_its_input(rows: int, cols: int, seed: int, data: st.DataObject) -> None:
    torch.manual_seed(seed)
    weight, x = torch.randn(rows, cols), torch.randn(2, 7, cols) * 3
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=14, max_size=14))).reshape(2, 7)
    mask[0, 0] = True
    scorer = Wanda()
    scorer.observe(linear_view(weight, x, mask))
    score = scorer.importance()
    for i in range(rows):
        for j in range(cols):
            squares = [float(x[b, t, j]) ** 2 for b in range(2) for t in range(7) if mask[b, t]]
            expected = abs(float(weight[i, j])) * (sum(squares) / len(squares)) ** 0.5
            assert float(score[i, j]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILY)
def test_wanda_on_single_weights_of_a_model(family: str) -> None:
    model, (ids, mask) = zoo(family), padded()
    expected = reference_wanda(model, ids, mask)
    scores = importance(model, ids, "wanda", axis="weight", mask=mask)
    assert scores
    for name, score in scores.items():
        torch.testing.assert_close(score.double(), expected[name.replace(":", ".")], rtol=2e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.cover
@pytest.mark.parametrize("reduction", ["sum", "mean", "max"])
@pytest.mark.parametrize("family", FAMILY)
def test_wanda_adds_up_what_a_unit_owns_in_linear_layers(family: str, reduction: str) -> None:
    """What a unit owns is found from the mask, which inputs belong to it from hooks: neither asks the scorer."""
    model, (ids, mask) = zoo(family), padded()
    graph = sspruner.trace(model)
    expected = reference_wanda(model, ids, mask)
    paths = [f"{site.path}." for site in graph.sites if site.path.startswith(f"{graph.blocks}.")]  # no embeddings, head
    inside = {name: s for name, s in expected.items() if name.startswith(tuple(paths))}
    twice = {"hidden"} if family == "zamba2" else set()  # it has square matrices, owned by row and by column
    axes = [axis for axis in graph.axes if axis in Wanda.axes - twice]
    scores = importance(model, ids, "wanda", axis=axes, mask=mask, options={"reduction": reduction})
    assert {graph.groups[name].axis for name in scores} == set(axes)
    for name, score in scores.items():
        axis = graph.groups[name].axis
        if axis in ("expert", "expert_mlp", "latent"):
            inside = inside | reference_experts(model, ids, mask, idle=float(axis == "expert_mlp"))
        within = {key: s for key, s in inside.items() if axis != "hidden" or ".experts." not in key}
        for g, u in some_units(graph.groups[name]):
            values = elements(within, owned(model, graph.groups[name], g, u))
            value = values.max() if reduction == "max" else getattr(values, reduction)()
            assert float(score[g, u]) == pytest.approx(float(value), rel=1e-3), (name, g, u)


def test_wanda_counts_nothing_but_linear_layers() -> None:
    model, ids = tiny_model(), tokens()
    before = importance(model, ids, "wanda", axis=["state", "head"])
    for name, parameter in model.named_parameters():
        if name.endswith(("D", "norm.weight")) and "mixer" in name:
            parameter.data *= 3  # out_proj's input grows threefold, relative to a norm that takes it out again
    after = importance(model, ids, "wanda", axis=["state", "head"])
    for name in before:
        if name.endswith(":state") and ".0." in name:
            torch.testing.assert_close(after[name], before[name])


@pytest.mark.parametrize("axis", ["weight", "state", "head", "hidden"])
def test_wanda_does_not_depend_on_batches_or_padding(axis: str) -> None:
    model, (ids, mask) = tiny_model(groups=2), padded()
    whole = importance(model, ids, "wanda", axis=axis, mask=mask)
    with batches_of(19):
        split = importance(model, ids, "wanda", axis=axis, mask=mask)
    other = torch.where(mask, ids, (ids + 7) % 31)
    elsewhere = importance(model, other, "wanda", axis=axis, mask=mask)
    for name, score in whole.items():
        torch.testing.assert_close(split[name], score, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(elsewhere[name], score, rtol=1e-5, atol=1e-7)


def test_wanda_of_inputs_that_are_all_zero_is_zero() -> None:
    scorer = Wanda()
    scorer.observe(linear_view(torch.randn(3, 4), torch.zeros(2, 5, 4)))
    assert scorer.importance().eq(0).all()


def test_wanda_says_so_if_it_sees_nothing_of_the_units() -> None:
    with pytest.raises(sspruner.InputError, match=r"scorer 'wanda' on .*:state.*no linear layer of these units"):
        sspruner.score(zoo("zamba"), "wanda", calibration=calibrated(tokens()))
    with pytest.raises(sspruner.InputError, match="scorer 'wanda': reduction='median'; known: sum, mean, max"):
        Wanda(reduction="median")


# SNIP and gradient-aware magnitude


@pytest.mark.cover
@pytest.mark.parametrize("family", [*FAMILY, "zamba"])
def test_snip_is_the_first_order_change_summed_over_what_a_unit_owns(family: str) -> None:
    model, (ids, mask) = zoo(family), padded()
    gradients = reference_gradients(model, ids, mask)
    product = {name: (p.detach() * gradients[name]).abs() for name, p in model.named_parameters()}
    graph = sspruner.trace(model)
    axes = [axis for axis in graph.axes if axis in Snip.axes]
    scores = importance(model, ids, "snip", axis=axes, mask=mask)
    assert {graph.groups[name].axis for name in scores} == set(axes)
    for name, score in scores.items():
        for g, u in some_units(graph.groups[name]):
            expected = elements(product, owned(model, graph.groups[name], g, u)).sum()
            largest = float(score.max())
            assert float(score[g, u]) == pytest.approx(float(expected), rel=1e-2, abs=1e-3 * largest), (name, g, u)


@pytest.mark.cover(most=5)
@pytest.mark.parametrize("family", FAMILY)
@pytest.mark.parametrize(("scorer", "options"), [("snip", {}), ("gradmag", {}), ("gradmag", {"alpha": 0.5})])
def test_single_weights_by_size_and_gradient(family: str, scorer: str, options: dict[str, Any]) -> None:
    model, (ids, mask) = zoo(family), padded()
    gradients, parameters = reference_gradients(model, ids, mask), dict(model.named_parameters())
    scores = importance(model, ids, scorer, axis="weight", mask=mask, options=options)
    assert scores
    for name, score in scores.items():
        tensor = name.replace(":", ".")
        expected = parameters[tensor].detach().abs() * gradients[tensor].abs() ** options.get("alpha", 1)
        torch.testing.assert_close(score, expected, rtol=1e-2, atol=1e-3 * float(expected.max()))


def test_snip_scores_the_decay_of_mamba1() -> None:
    model, (ids, mask) = zoo("mamba"), padded()
    gradients, parameters = reference_gradients(model, ids, mask), dict(model.named_parameters())
    scores = importance(model, ids, "snip", axis="decay", mask=mask)
    assert len(scores) == model.config.num_hidden_layers
    for name, score in scores.items():
        tensor = name.removesuffix(":decay") + ".A_log"
        expected = (parameters[tensor].detach() * gradients[tensor]).abs()
        torch.testing.assert_close(score, expected, rtol=1e-2, atol=1e-3 * float(expected.max()))


def test_gradmag_without_gradients_is_the_magnitude_and_needs_no_data() -> None:
    model = tiny_model()
    scores = sspruner.score(model, "gradmag", axis="weight", options={"alpha": 0}, calibration="no such file")
    for name, score in scores.importance.items():
        assert torch.equal(score, model.get_parameter(name.replace(":", ".")).detach().abs())


@pytest.mark.parametrize("alpha", [-1, "1", True, float("inf"), float("nan")])
def test_gradmag_refuses_an_alpha_that_means_nothing(alpha: Any) -> None:
    with pytest.raises(sspruner.InputError, match=r"scorer 'gradmag': alpha=.*; must be a number, at least 0"):
        GradMag(alpha=alpha)


@pytest.mark.slow
@given(models(dtypes=FP32), st.sampled_from(["snip", "gradmag"]))
def test_gradients_do_not_depend_on_batches_or_padding(model: nn.Module, scorer: str) -> None:
    ids, mask = padded()
    whole = importance(model, ids, scorer, axis="weight", mask=mask)
    with batches_of(19):
        split = importance(model, ids, scorer, axis="weight", mask=mask)
    other = torch.where(mask, ids, (ids + 7) % 31)
    elsewhere = importance(model, other, scorer, axis="weight", mask=mask)
    for name, score in whole.items():
        slack = 1e-3 * float(score.max())
        torch.testing.assert_close(split[name], score, rtol=1e-2, atol=slack)
        torch.testing.assert_close(elsewhere[name], score, rtol=1e-2, atol=slack)


# All of them


@pytest.mark.parametrize("scorer", ["wanda", "snip", "gradmag"])
def test_permuting_the_outputs_of_a_layer_permutes_its_scores(scorer: str) -> None:
    """Neurons of an MLP in another order: rows of gate and up, columns of down."""
    model, ids = zoo("jamba", experts=1), tokens()
    before = importance(model, ids, scorer, axis="weight")
    (mlp,) = {n.rpartition(".")[0] for n in before if n.endswith("layers.0.feed_forward.up_proj:weight")}
    module = model.get_submodule(mlp)
    order = torch.randperm(module.up_proj.out_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in (module.gate_proj.weight, module.up_proj.weight):
            p.copy_(p[order].clone())
        module.down_proj.weight.copy_(module.down_proj.weight[:, order].clone())
    after = importance(model, ids, scorer, axis="weight")
    for name, score in before.items():
        expected = score
        if name.startswith(mlp):
            expected = score[:, order] if "down_proj" in name else score[order]
        torch.testing.assert_close(after[name], expected, rtol=1e-2, atol=1e-3 * float(expected.max()))


@pytest.mark.cover(most=2)
@pytest.mark.parametrize("scorer", ["wanda", "snip", "gradmag", "sparsegpt"])
def test_they_score_no_tensor_that_must_not_be_touched(scorer: str) -> None:
    cls, _ = find_scorer(scorer)
    assert not cls.axes & {"block", "mixer"}
    for family in FAMILIES:
        tensors = [g.tensor for g in sspruner.trace(zoo(family)).on_axis("weight").values()]
        assert not [t for t in tensors if t.endswith(("A_log", ".D", "dt_bias", "norm.weight", "conv1d.weight"))]


@pytest.mark.parametrize(
    ("scorer", "within"), [("wanda", "row"), ("sparsegpt", "tensor"), ("gradmag", "global"), ("snip", "global")]
)
def test_where_weights_compete_unless_the_user_says_otherwise(scorer: str, within: str) -> None:
    """Of every row, tensor or model half stays; and of what is smaller not just half."""
    ids = calibrated(tokens(12, 19))
    result = sspruner.prune(zoo("mamba2"), scorer, axis="weight", sparsity=0.5, mode="mask", calibration=ids)
    kept = list(result.plan.elements.values())
    by_row, by_tensor = torch.cat([k.sum(1) / k.shape[1] for k in kept]), torch.stack([k.float().mean() for k in kept])
    overall = torch.cat([k.flatten() for k in kept]).float().mean()
    assert overall == pytest.approx(0.5, abs=1e-3)
    assert by_row.allclose(torch.tensor(0.5)) == (within == "row")
    assert by_tensor.allclose(torch.tensor(0.5), atol=1e-2) == (within != "global")
    assert by_tensor.min() >= 0.05
