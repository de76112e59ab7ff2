"""SparseGPT: against optimal brain surgery one weight at a time, brute force, and what it is for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner import Choose
from sspruner_plugins.sparsegpt import SparseGPT
from sspruner_plugins.wanda import Wanda
from support.linear_views import linear_view
from support.scoring import calibrated
from support.tiny import logits, tiny_model, tokens

SMALL = {"rows": st.integers(1, 5), "cols": st.integers(1, 9), "seed": st.integers(0, 999)}


def correlated(rows: int, cols: int, seed: int, steps: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight (rows, cols), inputs (2, steps / 2, cols)): inputs that share half of what they say."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(cols, cols, generator=generator) + torch.randn(cols, 1, generator=generator)
    x = torch.randn(2, steps // 2, cols, generator=generator) @ mixed
    return torch.randn(rows, cols, generator=generator), x


def best(fraction: float) -> Choose:
    """Keep the best of a whole block: of equal ones the first."""

    def choose(scores: torch.Tensor) -> torch.Tensor:
        order = scores.flatten().argsort(descending=True, stable=True)
        keep = torch.zeros(scores.numel(), dtype=torch.bool)
        keep[order[: round(scores.numel() * fraction)]] = True
        return keep.reshape(scores.shape)

    return choose


def pattern(n: int, m: int) -> Choose:
    """Keep the best n of every m consecutive columns."""

    def choose(scores: torch.Tensor) -> torch.Tensor:
        runs = scores.unflatten(1, (-1, m))
        top = runs.argsort(dim=-1, descending=True, stable=True)[..., :n]
        return torch.zeros_like(runs, dtype=torch.bool).scatter(-1, top, True).flatten(1)

    return choose


def fixed(keep: torch.Tensor) -> Choose:
    """These, block after block."""
    place = 0

    def choose(scores: torch.Tensor) -> torch.Tensor:
        nonlocal place
        place += scores.shape[1]
        return keep[:, place - scores.shape[1] : place]

    return choose


def observed(weight: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> SparseGPT:
    scorer = SparseGPT(**options)
    scorer.observe(linear_view(weight, x, mask))
    return scorer


def hessian(x: torch.Tensor, percdamp: float) -> torch.Tensor:
    x = x.flatten(0, -2).double()
    gram = x.T @ x / len(x)
    return gram + percdamp * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def slow(weight: torch.Tensor, h: torch.Tensor, choose: Choose, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Algorithm 1 without its tricks: (keep, weight). A weight at a time, the inverse of what is left each time."""
    weight, keep = weight.double().clone(), torch.ones(weight.shape, dtype=torch.bool)
    rows, cols = weight.shape
    left = [torch.linalg.inv(h[j:, j:]) for j in range(cols)]  # columns j and later are still free
    for start in range(0, cols, block):
        stop = min(start + block, cols)
        scores = torch.stack([weight[:, j] ** 2 / left[j][0, 0] for j in range(start, stop)], 1)
        keep[:, start:stop] = choose(scores)
        for i in range(rows):
            for j in range(start, stop):
                if not keep[i, j]:
                    weight[i, j:] -= weight[i, j] / left[j][0, 0] * left[j][:, 0]
                    weight[i, j] = 0
    return keep, weight


def error(weight: torch.Tensor, new: torch.Tensor, x: torch.Tensor) -> float:
    """Mean squared change of the layer's output."""
    return float((x.double() @ (new.double() - weight.double()).T).square().mean())


@given(**SMALL, block=st.integers(1, 10), fraction=st.floats(0, 1), percdamp=st.sampled_from([0.0, 0.01, 0.3]))
def test_it_is_optimal_brain_surgery_a_weight_at_a_time(
    rows: int, cols: int, seed: int, block: int, fraction: float, percdamp: float
) -> None:
    weight, x = correlated(rows, cols, seed)
    keep, updates = observed(weight, x, percdamp=percdamp, block=block).reduce(best(fraction))
    expected_keep, expected = slow(weight, hessian(x, percdamp), best(fraction), block)
    assert torch.equal(keep, expected_keep)
    torch.testing.assert_close(updates["weight"].double(), expected, rtol=1e-7, atol=1e-8)  # fp32's rounding


@given(**SMALL)
def test_importance_is_the_rise_of_the_error_if_one_weight_goes_and_the_others_adapt(
    rows: int, cols: int, seed: int
) -> None:
    weight, x = correlated(rows, cols, seed)
    importance = observed(weight, x, percdamp=0.0).importance()
    x = x.flatten(0, -2).double()
    for i in range(rows):
        target = x @ weight[i].double()
        for j in range(cols):
            others = x[:, [k for k in range(cols) if k != j]]
            fit = others @ torch.linalg.pinv(others) @ target
            rise = (fit - target).square().mean()
            assert float(importance[i, j]) == pytest.approx(float(rise), rel=1e-5, abs=1e-9)


@given(**SMALL, fraction=st.floats(0, 1))
def test_blocks_only_say_when_zeros_are_chosen(rows: int, cols: int, seed: int, fraction: float) -> None:
    weight, x = correlated(rows, cols, seed)
    keep = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) < fraction
    results = [observed(weight, x, block=block).reduce(fixed(keep)) for block in (1, 3, 128)]
    for found, updates in results:
        assert torch.equal(found, keep)
        torch.testing.assert_close(updates["weight"], results[0][1]["weight"])
        assert torch.equal(updates["weight"] != 0, keep)


def test_what_is_left_of_a_row_after_its_last_zero_is_the_least_squares_fit() -> None:
    """Zeros in the first columns only: every later column adapts, so nothing better exists with these zeros."""
    weight, x = correlated(3, 8, 0)
    keep = torch.arange(8).expand(3, 8) >= 3
    _, updates = observed(weight, x, percdamp=0.0).reduce(fixed(keep))
    flat = x.flatten(0, -2).double()
    fit = torch.linalg.lstsq(flat[:, 3:], flat @ weight.double().T).solution.T
    torch.testing.assert_close(updates["weight"][:, 3:].double(), fit, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("choose", [best(0.5), best(0.25), pattern(2, 4), pattern(4, 8)])
def test_it_disturbs_a_layer_less_than_wanda_and_magnitude(choose: Choose) -> None:
    """With as many zeros, and also with the very same zeros."""
    ours = same_zeros = wanda = magnitude = 0.0
    for seed in range(10):
        weight, x = correlated(24, 32, seed, steps=400)
        keep, updates = observed(weight, x, block=8).reduce(choose)
        scorer = Wanda()
        scorer.observe(linear_view(weight, x))
        ours += error(weight, updates["weight"], x)
        same_zeros += error(weight, weight * keep, x)
        by_wanda = choose(scorer.importance())
        wanda += error(weight, weight * by_wanda, x)
        magnitude += error(weight, weight * choose(weight.abs()), x)
        assert keep.sum() == by_wanda.sum()
        _, repaired = observed(weight, x).reduce(fixed(by_wanda))
        assert error(weight, repaired["weight"], x) < error(weight, weight * by_wanda, x)
    assert ours < 0.7 * min(same_zeros, wanda, magnitude)


@given(st.sampled_from([(2, 4), (4, 8), (1, 2)]), st.sampled_from([8, 16]), st.integers(0, 99))
def test_patterns_hold_exactly(ratio: tuple[int, int], block: int, seed: int) -> None:
    n, m = ratio
    weight, x = correlated(5, 24, seed)
    keep, updates = observed(weight, x, block=block).reduce(pattern(n, m))
    assert keep.unflatten(1, (-1, m)).sum(-1).eq(n).all()
    assert torch.equal(updates["weight"] != 0, keep)


def test_a_copy_of_a_column_goes_for_nothing() -> None:
    weight, x = correlated(6, 8, 3, steps=200)
    x[..., 4:] = x[..., :4]  # every column has a twin further right
    keep = torch.arange(8).expand(6, 8) >= 4
    _, updates = observed(weight, x, percdamp=1e-6).reduce(fixed(keep))
    assert error(weight, updates["weight"], x) < 1e-6 * error(weight, weight * keep, x)
    torch.testing.assert_close(updates["weight"][:, 4:], weight[:, :4] + weight[:, 4:], rtol=1e-3, atol=1e-3)


def test_columns_that_are_never_active_go_first_and_change_nothing() -> None:
    weight, x = correlated(4, 8, 0)
    dead = torch.tensor([False, True, False, False, True, True, False, False])
    weight[:, dead] *= 1000  # however large
    x[..., dead] = 0
    assert observed(weight, x, percdamp=0).importance().isfinite().all()
    scorer = observed(weight, x)
    assert scorer.importance()[:, dead].eq(0).all()
    assert scorer.importance()[:, ~dead].gt(0).all()
    keep, updates = scorer.reduce(best(5 / 8))
    assert not keep[:, dead].any()
    assert torch.equal(updates["weight"][:, ~dead], weight[:, ~dead])
    keep, updates = scorer.reduce(best(6 / 8))  # some of them stay, and stay as they are
    new = updates["weight"]
    assert keep[:, dead].sum() == 4
    assert torch.equal(new[:, dead], weight[:, dead] * keep[:, dead])
    live, _ = observed(weight[:, ~dead], x[..., ~dead]).reduce(best(0.5)), None
    keep, updates = scorer.reduce(fixed(torch.ones(4, 8).bool().masked_scatter(~dead.expand(4, 8), live[0])))
    torch.testing.assert_close(updates["weight"][:, ~dead], live[1]["weight"])  # as if they were not there


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_inputs_that_never_vary_give_no_nan(value: float) -> None:
    weight, x = torch.randn(3, 6), torch.full((2, 10, 6), value)
    scorer = observed(weight, x)
    assert scorer.importance().isfinite().all()
    keep, updates = scorer.reduce(best(0.5))
    assert keep.sum() == 9
    assert updates["weight"].isfinite().all()
    assert torch.equal(updates["weight"] != 0, keep)


@given(**SMALL, data=st.data())
def test_rows_that_do_not_compete_stay_as_they_are(rows: int, cols: int, seed: int, data: st.DataObject) -> None:
    weight, x = correlated(rows, cols, seed)
    free = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))

    def choose(scores: torch.Tensor) -> torch.Tensor:
        keep = torch.ones(scores.shape, dtype=torch.bool)
        keep[free] = best(0.5)(scores[free])
        return keep

    keep, updates = observed(weight, x, block=4).reduce(choose)
    assert keep[~free].all()
    assert torch.equal(updates["weight"][~free], weight[~free])
    if free.any():
        alone, those = observed(weight[free], x, block=4).reduce(best(0.5))
        assert torch.equal(keep[free], alone)
        torch.testing.assert_close(updates["weight"][free], those["weight"])


@given(**SMALL)
def test_permuting_rows_permutes_everything(rows: int, cols: int, seed: int) -> None:
    weight, x = correlated(rows, cols, seed)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    plain, permuted = observed(weight, x, block=3), observed(weight[order], x, block=3)
    torch.testing.assert_close(permuted.importance(), plain.importance()[order])
    (keep, updates), (keep_there, updates_there) = plain.reduce(best(0.5)), permuted.reduce(best(0.5))
    assert torch.equal(keep_there, keep[order])
    torch.testing.assert_close(updates_there["weight"], updates["weight"][order])


@given(**SMALL, c=st.floats(1e-3, 1e3))
def test_the_scale_of_the_inputs_does_not_matter(rows: int, cols: int, seed: int, c: float) -> None:
    weight, x = correlated(rows, cols, seed)
    (keep, updates), (keep_there, updates_there) = (observed(weight, y).reduce(best(0.5)) for y in (x, x * c))
    assert torch.equal(keep, keep_there)
    torch.testing.assert_close(updates["weight"], updates_there["weight"], rtol=1e-3, atol=1e-5)


@given(**SMALL)
def test_batches_and_padding_do_not_matter(rows: int, cols: int, seed: int) -> None:
    weight, x = correlated(rows, cols, seed)
    whole, split = observed(weight, x), SparseGPT()
    for part in (x[:, :7], x[:, 7:9], x[:, 9:]):
        noise = torch.full((2, 3, cols), 100.0)
        mask = torch.cat([torch.ones(part.shape[:2]), torch.zeros(2, 3)], 1).bool()
        split.observe(linear_view(weight, torch.cat([part, noise], 1), mask))
    assert split.tokens == whole.tokens
    torch.testing.assert_close(split.importance(), whole.importance(), rtol=1e-9, atol=0)
    (keep, updates), (keep_there, updates_there) = whole.reduce(best(0.5)), split.reduce(best(0.5))
    assert torch.equal(keep, keep_there)
    torch.testing.assert_close(updates["weight"], updates_there["weight"])


def test_errors_say_what_to_do() -> None:
    weight, x = correlated(3, 12, 0, steps=10)
    with pytest.raises(sspruner.InputError, match=r"10 calibration tokens .* 12 columns; raise --samples or --seq-len"):
        observed(weight, x).importance()
    with pytest.raises(sspruner.InputError, match="no calibration token reaches this layer"):
        SparseGPT().importance()
    with pytest.raises(sspruner.InputError, match="singular with percdamp=0; raise it"):
        observed(torch.randn(2, 3), torch.ones(1, 9, 3), percdamp=0).importance()
    for options in ({"percdamp": -0.1}, {"percdamp": "much"}, {"percdamp": True}, {"block": 0}, {"block": 2.5}):
        (name,) = options
        with pytest.raises(sspruner.InputError, match=f"scorer 'sparsegpt': {name}=.*; must be"):
            SparseGPT(**options)


# In the engine


def pruned(scorer: str, **asked: Any) -> tuple[torch.nn.Module, sspruner.Result]:
    model = tiny_model(layers=3, heads_per_group=4)
    asked = {"axis": "weight", "mode": "mask", "calibration": calibrated(tokens(12, 19)), **asked}
    return model, sspruner.prune(model, scorer, **asked)


@pytest.mark.slow
@pytest.mark.parametrize("one_shot", [False, True])
@pytest.mark.parametrize("budget", [{"sparsity": 0.5}, {"sparsity": 0.5, "granularity": "row"}, {"pattern": "2:4"}])
def test_a_pruned_model_is_zero_where_the_plan_says(budget: dict[str, Any], one_shot: bool) -> None:
    model, result = pruned("sparsegpt", one_shot=one_shot, options={"block": 4}, **budget)
    assert len(result.plan.elements) == 6
    for name, keep in result.plan.elements.items():
        weight = model.get_parameter(name.replace(":", "."))
        assert torch.equal(weight != 0, keep)
        assert float(keep.float().mean()) == pytest.approx(0.5, abs=0.01)
        assert torch.equal(result.plan.updates[name.replace(":", ".")], weight)
        if "pattern" in budget:
            assert keep.unflatten(1, (-1, 4)).sum(-1).eq(2).all()
        if "granularity" in budget:
            assert keep.sum(1).unique().numel() == 1


@pytest.mark.exhaustive
@pytest.mark.slow
def test_it_disturbs_a_trained_model_less_than_wanda(reference: tuple) -> None:
    dense, _ = reference
    ids = torch.randint(dense.config.vocab_size, (28, 96), generator=torch.Generator().manual_seed(0))

    def kl(scorer: str) -> float:
        model = copy.deepcopy(dense)
        result = sspruner.prune(model, scorer, axis="weight", pattern="2:4", mode="mask", calibration=ids)
        return result.report.pruned["kl_to_dense"]  # on other tokens than the calibration's

    assert kl("sparsegpt") < 0.85 * kl("wanda")


def test_layer_by_layer_the_hessian_is_that_of_the_pruned_layers_before() -> None:
    """The second layer by hand: what its in_proj is given after the first one has been pruned."""
    model, result = pruned("sparsegpt", sparsity=0.5)
    name = "backbone.layers.1.mixer.in_proj.weight"
    seen: list[torch.Tensor] = []
    module = model.get_submodule(name.removesuffix(".weight"))
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    logits(model, tokens(12, 19))
    handle.remove()
    weight = tiny_model(layers=3, heads_per_group=4).get_parameter(name).detach()
    keep, expected = slow(weight, hessian(seen[0], 0.01), best(0.5), 128)
    assert torch.equal(result.plan.elements[name.replace(".weight", ":weight")], keep)
    torch.testing.assert_close(result.plan.updates[name].double(), expected, rtol=1e-3, atol=1e-4)


def test_rows_of_the_budget_reach_the_scorer() -> None:
    dense = tiny_model(layers=3, heads_per_group=4)
    model, result = pruned("sparsegpt", sparsity=0.5, rows=["B", "C"])
    for name, group in sspruner.trace(dense).on_axis("weight").items():
        before, after = (m.get_parameter(group.tensor) for m in (dense, model))
        changed = (before != after).any(1)
        allowed = torch.zeros(len(before), dtype=torch.bool)
        for run in ("B", "C"):
            allowed[(group.runs or {}).get(run, [])] = True
        assert not changed[~allowed].any(), name
        assert changed.any() == allowed.any()
    assert len(result.plan.elements) == 3


def test_the_user_is_told_which_layer_wants_more_tokens() -> None:
    with pytest.raises(sspruner.InputError, match=r"sparsegpt.*in_proj:weight.*4 calibration tokens .* 8 columns"):
        pruned("sparsegpt", calibration=calibrated(tokens(1, 4)))
