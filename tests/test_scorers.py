"""What the shipped scorers compute: formulas against the model itself, symmetries, invariances, and their ranking."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import states
from test_state import views
from tiny import models, tiny_model, tokens

import sspruner
from sspruner.calibrate.sources import Calibration
from sspruner.planning.allocate import select
from sspruner.planning.plan import Plan, Selection
from sspruner.surgery.mask import mask_group, unmask

FP32 = (torch.float32,)
SCORERS = [("ghost", {}), ("ghost", {"variant": "means"}), ("magnitude", {}), ("random", {})]


def calibrated(ids: torch.Tensor, mask: torch.Tensor | None = None) -> Calibration:
    """Every row observed, none held out."""
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    return Calibration(ids, mask, ids[:1], mask[:1], "tokens", 0, held_out_is_separate=False)


def importance(model: torch.nn.Module, ids: torch.Tensor, scorer: str = "ghost", **kwargs: object) -> dict:
    mask = kwargs.pop("mask", None)
    return sspruner.score(model, scorer, calibration=calibrated(ids, mask), **kwargs).importance


def permute_states(model: torch.nn.Module, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Renumber the states of every group of every layer; returns the permutations, (G, N) per layer group."""
    orders = {}
    for name, group in sspruner.trace(model).on_axis("state").items():
        order = torch.stack([torch.randperm(group.units, generator=generator) for _ in range(group.groups)])
        orders[name] = order
        for member in group.members:
            parameter = model.get_parameter(member.parameter).data
            for g in range(group.groups):
                rows = member.index[g, :, 0]
                parameter[rows] = parameter[rows[order[g]]].clone()
    return orders


@given(models(dtypes=FP32), st.sampled_from([s for s in SCORERS if s[0] != "random"]), st.integers(0, 99))
def test_permuting_states_permutes_scores(model: torch.nn.Module, scorer: tuple, seed: int) -> None:
    name, options = scorer
    before = importance(model, tokens(), name, options=options)
    permuted = copy.deepcopy(model)
    orders = permute_states(permuted, torch.Generator().manual_seed(seed))
    for group, scores in importance(permuted, tokens(), name, options=options).items():
        expected = before[group].gather(1, orders[group])
        torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-5 * float(expected.max()))


@given(models(dtypes=FP32), st.floats(0.01, 100), st.sampled_from(["joint", "means"]), st.data())
def test_scaling_what_reads_a_state_scales_its_score(
    model: torch.nn.Module, c: float, variant: str, data: st.DataObject
) -> None:
    """C[n] * c on the view gives S[n] * c and leaves every other score alone."""
    cls, _ = sspruner.plugins.manager.scorer("ghost")
    for view in views(model, tokens()):
        G, N = view.B.shape[2:]
        g, n = data.draw(st.integers(0, G - 1)), data.draw(st.integers(0, N - 1))
        plain, scaled = cls(variant=variant), cls(variant=variant)
        plain.observe(view)
        factor = torch.ones(G, N)
        factor[g, n] = c
        view.__dict__["projected"] = replace(view.projected, C=view.projected.C * factor)
        view.__dict__.pop("ghost_sum", None)
        scaled.observe(view)
        torch.testing.assert_close(scaled.importance(), plain.importance() * factor.double(), rtol=1e-4, atol=1e-12)


@given(models(dtypes=FP32), st.data())
def test_ghost_is_the_mean_squared_change_of_y(model: torch.nn.Module, data: st.DataObject) -> None:
    """S^2 = what the mixer's scan output really changes by, per token, when only that state is masked."""
    ids = tokens(2, 19)
    scores = importance(model, ids)
    graph = sspruner.trace(model)
    name = data.draw(st.sampled_from(list(graph.groups)))
    group = graph.groups[name]
    g, n = data.draw(st.integers(0, group.groups - 1)), data.draw(st.integers(0, group.units - 1))
    if group.units == 1:
        return  # a layer without a state is not a cut
    y = [_scan_output(model, group.layer, ids)]
    everything = tuple(range(group.units))
    keep = [everything] * group.groups
    keep[g] = tuple(u for u in everything if u != n)
    mask_group(model, group, Selection(group.units, tuple(keep)))
    y.append(_scan_output(model, group.layer, ids))
    unmask(model)
    measured = (y[1] - y[0]).double().square().sum() / ids.numel()
    exact = scores[name][g, n].double().square()
    # y carries fp32 rounding of all other states; only what is above it can be compared
    rounding = float(y[0].double().square().sum() / ids.numel()) * 1e-11
    torch.testing.assert_close(measured, exact, rtol=2e-3, atol=rounding)


def _scan_output(model: torch.nn.Module, layer: str, ids: torch.Tensor) -> torch.Tensor:
    """What the model's own code hands to the gated norm: (b, T, H*P)."""
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(f"{layer}.norm").register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    hook.remove()
    return seen[0]


@given(models(dtypes=FP32))
def test_means_is_the_product_of_means(model: torch.nn.Module) -> None:
    scores = importance(model, tokens(), options={"variant": "means"})
    for view in views(model, tokens()):
        p = view.projected
        b, T, G, N = p.B.shape
        h2 = states(p).square().sum(3).view(b, T, G, -1, N).sum(3).mean((0, 1))  # (G, N)
        c2 = p.C.double().square().mean((0, 1))
        torch.testing.assert_close(
            scores[f"{view.layer}:state"].double(),
            (h2 * c2).sqrt(),
            rtol=1e-3,
            atol=1e-5 * float((h2 * c2).sqrt().max()),
        )


@pytest.mark.parametrize(("name", "options"), SCORERS)
@given(model=models())
def test_a_batch_split_changes_nothing(name: str, options: dict, model: torch.nn.Module) -> None:
    ids = tokens(6, 19)
    together = importance(model, ids, name, options=options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sspruner.pipeline.TOKENS_PER_BATCH", 19)  # one sequence at a time
        apart = importance(model, ids, name, options=options)
    loose = 1e-4 if model.dtype == torch.float32 else 2e-2
    for group, scores in together.items():
        torch.testing.assert_close(apart[group], scores, rtol=loose, atol=loose * float(scores.max()))


@given(models(dtypes=FP32), st.sampled_from([s for s in SCORERS if s[0] == "ghost"]), st.data())
def test_padding_changes_nothing(model: torch.nn.Module, scorer: tuple, data: st.DataObject) -> None:
    """Rows of different lengths, padded right with any token, score as the same rows given one by one."""
    lengths = data.draw(st.lists(st.integers(2, 19), min_size=2, max_size=4))
    ids, mask = tokens(len(lengths), 19), torch.arange(19) < torch.tensor(lengths)[:, None]
    padded = importance(model, ids, scorer[0], options=scorer[1], mask=mask)
    garbage = torch.where(mask, ids, 7)
    again = importance(model, garbage, scorer[0], options=scorer[1], mask=mask)
    for group, scores in padded.items():
        torch.testing.assert_close(again[group], scores)
    if scorer[1]:
        return  # the product of means is not a sum over rows
    squares = dict.fromkeys(padded, 0.0)
    for row, n in enumerate(lengths):
        for group, scores in importance(model, ids[row : row + 1, :n]).items():
            squares[group] = squares[group] + scores.double().square() * n
    for group, total in squares.items():
        expected = (total / sum(lengths)).sqrt().float()
        torch.testing.assert_close(padded[group], expected, rtol=1e-3, atol=1e-5 * float(expected.max()))


@given(models(dtypes=FP32), st.integers(1, 9))
def test_left_padding_changes_nothing_without_biases(model: torch.nn.Module, pad: int) -> None:
    """in_proj's bias reaches padded positions in transformers itself, so this law holds for models without it."""
    if model.config.use_bias:
        return
    ids = tokens(2, 12)
    padded = torch.cat([torch.full((2, pad), 3), ids], 1)
    mask = torch.arange(12 + pad).expand(2, -1) >= pad
    plain = importance(model, ids)
    for group, scores in importance(model, padded, mask=mask).items():
        torch.testing.assert_close(scores, plain[group], rtol=1e-3, atol=1e-5 * float(plain[group].max()))


def test_magnitude_is_the_product_of_row_norms() -> None:
    model = tiny_model(groups=2, state=3)
    mixer = model.backbone.layers[1].mixer
    D, weight = mixer.intermediate_size, mixer.in_proj.weight.detach().double()
    for g in range(2):
        for n in range(3):
            B, C = weight[2 * D + 3 * g + n], weight[2 * D + 6 + 3 * g + n]
            expected = (B**2).sum().sqrt() * (C**2).sum().sqrt()
            score = sspruner.score(model, "magnitude").importance["backbone.layers.1.mixer:state"][g, n]
            assert float(score) == pytest.approx(float(expected), rel=1e-6)


def test_random_depends_on_seed_and_layer_only() -> None:
    one, two = tiny_model(seed=1, state=64), tiny_model(seed=2, state=64)
    scores = sspruner.score(one, "random", seed=5).importance
    same = sspruner.score(two, "random", seed=5).importance
    other = sspruner.score(one, "random", seed=6).importance
    first, second = scores.values()
    assert all(torch.equal(scores[g], same[g]) for g in scores)
    assert not torch.equal(first, second)
    assert not any(torch.equal(scores[g], other[g]) for g in scores)
    assert sorted(first[0].tolist()) == list(range(64))  # a permutation


def test_a_scorer_leaves_the_model_alone() -> None:
    for name, options in SCORERS:
        model = tiny_model().train()
        before = {n: p.clone() for n, p in model.named_parameters()}
        importance(model, tokens(), name, options=options)
        assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
        assert model.training
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_model_with_broken_weights_is_refused_by_name(bad: float) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.backbone.layers[1].mixer.D[0] = bad
    for job in (sspruner.score, sspruner.prune):
        with pytest.raises(sspruner.ModelError, match=r"backbone\.layers\.1\.mixer\.D: 1 of 2 weights are NaN or inf"):
            job(model, "magnitude", calibration=tokens())


@given(models(dtypes=FP32), st.floats(0, 0.9))
def test_sequential_scores_each_layer_on_the_cut_ones_before_it(model: torch.nn.Module, sparsity: float) -> None:
    dense = copy.deepcopy(model)
    data = calibrated(tokens(3, 19))
    result = sspruner.prune(model, "ghost", sparsity=sparsity, calibration=data)
    cut: dict[str, Selection] = {}
    for name, scores in result.scores.importance.items():
        zeroed = sspruner.apply(copy.deepcopy(dense), Plan("state", dict(cut)), mode="mask").state_dict()
        so_far = copy.deepcopy(dense)  # the model whose inputs this layer should have seen
        so_far.load_state_dict(zeroed)
        expected = sspruner.score(so_far, "ghost", calibration=data).importance[name]
        torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-5 * float(expected.max()))
        cut[name] = result.plan.groups[name]
        assert cut[name] == select(scores, cut[name].after)


@given(models(dtypes=FP32))
def test_one_shot_is_score_plan_apply(model: torch.nn.Module) -> None:
    by_hand, data = copy.deepcopy(model), calibrated(tokens(3, 19))
    result = sspruner.prune(model, "ghost", sparsity=0.5, one_shot=True, calibration=data)
    plan = sspruner.plan(sspruner.trace(by_hand), sspruner.score(by_hand, "ghost", calibration=data), sparsity=0.5)
    assert result.plan.groups == plan.groups
    sspruner.apply(by_hand, plan)
    assert all(torch.equal(p, by_hand.get_parameter(n)) for n, p in model.named_parameters())


@pytest.fixture(scope="module")
def self_text(reference: tuple) -> Calibration:
    model, _ = reference
    return sspruner.calibration("self", model, samples=24, seq_len=128, held_out=24, seed=0)


@pytest.mark.parametrize("sparsity", [0.75, 0.9])
def test_ghost_hurts_less_than_magnitude_and_that_less_than_random(
    sparsity: float, reference: tuple, self_text: Calibration
) -> None:
    model, _ = reference

    def kl(scorer: str, seed: int = 0) -> float:
        result = sspruner.prune(model, scorer, sparsity=sparsity, calibration=self_text, mode="mask", seed=seed)
        sspruner.unmask(model)
        assert result.report.pruned["perplexity"] > result.report.dense["perplexity"]
        return result.report.pruned["kl_to_dense"]

    random = sum(kl("random", seed) for seed in range(3)) / 3
    assert kl("ghost") < 0.7 * kl("magnitude")
    assert kl("magnitude") < 0.9 * random
