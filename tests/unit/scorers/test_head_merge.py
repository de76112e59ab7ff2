"""Head merging: exact where the merged units are equal, plain loops elsewhere; clusters and their order."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner.graph.group import DependencyGroup
from sspruner.scoring.known import find_scorer
from sspruner_plugins.head_merge import _balanced, _distances, _kmeans
from support.examples import examples
from support.scoring import calibrated
from support.tiny import logits, tiny_model, tokens
from support.zoo import rounding, zoo

HeadMerge = find_scorer("head-merge")[0]
METHODS = ("mean", "kmeans")


def merged(model: torch.nn.Module, axis: str, keep: int, **kwargs: Any) -> sspruner.Result:
    ids = calibrated(tokens(3, 19))
    return sspruner.prune(copy.deepcopy(model), "head-merge", axis=axis, keep=keep, calibration=ids, **kwargs)


@torch.no_grad()
def make_equal(model: torch.nn.Module, axis: str, classes: list[int]) -> None:
    """Units of the same class become copies of its first, in all that makes them; what reads them stays its own."""
    for group in sspruner.trace(model).on_axis(axis).values():
        for member in group.members:
            if member.dims == (1,) or not member.counted or member.tensor.endswith("norm.weight"):
                continue
            tensor = model.get_parameter(member.tensor)
            for g in range(group.groups):
                for unit, kind in enumerate(classes):
                    tensor[member.index[g, unit]] = tensor[member.index[g, classes.index(kind)]].clone()


def norms_are_exact(model: torch.nn.Module) -> None:
    """No epsilon: a norm that sees 1/m of the energy is then the same norm times sqrt(m)."""
    for layer in sspruner.trace(model).layers:
        norm = getattr(model.get_submodule(layer.path), "norm", None)
        if hasattr(norm, "variance_epsilon"):
            norm.variance_epsilon = 0.0


# (family, options, axis, class of each unit, units kept)
EQUAL = [
    ("falcon_h1", {"mamba_rms_norm": False, "heads": 6}, "head", [0, 1, 2, 0, 1, 0], 3),
    ("falcon_h1", {"mamba_rms_norm": False, "heads": 4}, "head", [0, 0, 0, 1], 2),
    ("falcon_h1", {"mamba_rms_norm": False, "groups": 4}, "group", [0, 1, 1, 0], 2),
    ("falcon_h1", {"heads": 4}, "head", [0, 1, 1, 0], 2),
    ("falcon_h1", {"heads": 4, "mamba_norm_before_gate": False}, "head", [0, 1, 1, 0], 2),
    ("falcon_h1", {"groups": 4}, "group", [1, 0, 0, 0], 2),
    ("mamba2", {"heads": 6}, "head", [0, 1, 2, 0, 1, 2], 3),
    ("mamba2", {"heads": 6}, "head", [0, 0, 0, 1, 1, 1], 2),
    ("mamba2", {"groups": 3}, "group", [0, 1, 0], 2),
    ("zamba2", {"heads": 4}, "head", [0, 1, 1, 0], 2),
    ("zamba", {"heads": 4, "channels": 4, "kv": 2}, "head", [0, 1, 1, 1], 2),
]


@pytest.mark.ci_cover(most=12)
@pytest.mark.cover(most=7)
@pytest.mark.parametrize("mode", ["mask", "slice"])
@pytest.mark.parametrize(("family", "options", "axis", "classes", "keep"), EQUAL, ids=str)
def test_equal_units_merge_without_a_trace(
    family: str, options: dict, axis: str, classes: list[int], keep: int, mode: str
) -> None:
    """The logits stay as they were: B/C groups with their heads, heads with their states, whatever the norm."""
    model = zoo(family, **options)
    make_equal(model, axis, classes)
    if axis == "head":
        norms_are_exact(model)
    ids = tokens()
    before = logits(model, ids)
    for method in METHODS if len(set(map(classes.count, classes))) == 1 else ("kmeans",):
        result = merged(model, axis, keep, options={"method": method}, mode=mode)
        assert all(selection.after == keep for selection in result.plan.groups.values())
        after = logits(result.model, ids)
        assert (after - before).abs().max() <= max(1e-5, 50 * rounding(model, ids)) * before.abs().max()


def test_an_epsilon_is_all_that_is_left() -> None:
    """With the norm's own epsilon the difference is of its size."""
    model, ids = tiny_model(heads_per_group=4), tokens()
    make_equal(model, "head", [0, 1, 1, 0])
    before = logits(model, ids)
    after = logits(merged(model, "head", 2).model, ids)
    assert 0 < (after - before).abs().max() < 1e-2 * before.abs().max()


def view_of(model: torch.nn.Module, group: DependencyGroup) -> Any:
    """What head-merge looks at."""
    tensor = lambda key: model.get_parameter(f"{group.layer}.{key}").detach().float().clone()  # noqa: E731
    names = {group.key(m.tensor): m.tensor for m in group.members if m.counted}
    weights = group.gather({key: model.get_parameter(name) for key, name in names.items()})
    return SimpleNamespace(group=group, weights=weights, tensor=tensor)


def scorer_on(model: torch.nn.Module, group: DependencyGroup, method: str = "mean", seed: int = 0) -> Any:
    scorer = HeadMerge(method=method)
    scorer.axis, scorer.seed = group.axis, seed
    scorer.observe(view_of(model, group))
    return scorer


def best(count: int) -> Any:
    def choose(scores: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(count).indices, True)

    return choose


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("family", "axis", "options"),
    [
        ("falcon_h1", "head", {"heads": 5}),
        ("falcon_h1", "head", {"heads": 5, "mamba_rms_norm": False}),
        ("mamba2", "group", {"groups": 4}),
        ("nemotron_h", "head", {"heads": 4}),
        ("zamba", "head", {"heads": 4, "channels": 4}),
    ],
    ids=str,
)
def test_what_makes_is_the_mean_and_what_reads_is_the_sum(family: str, axis: str, options: dict, method: str) -> None:
    """Every element, by loops over the clusters; what joins a cluster keeps its old values in the update."""
    model = zoo(family, **options)
    group = next(iter(sspruner.trace(model).on_axis(axis).values()))
    units, count = group.units, 2
    scorer = scorer_on(model, group, method)
    keep, updates = scorer.reduce(best(count))
    norm_index = next((m.index for m in group.members if m.tensor.endswith(".norm.weight")), None)
    factor = (count / units) ** 0.5 if axis == "head" else 1.0
    for g in range(group.groups):
        clusters = scorer._clusters(scorer.rows[g], scorer.orders[g], count)
        assert sorted(u for cluster in clusters for u in cluster) == list(range(units))
        assert sorted(cluster[0] for cluster in clusters) == keep[g].nonzero().flatten().tolist()
        for member in group.members:
            if not member.counted:
                continue
            key = group.key(member.tensor)
            old, new = model.get_parameter(member.tensor).detach().double(), updates[key].double()
            for cluster in clusters:
                for i in range(member.index.shape[2]):
                    rows = [int(member.index[g, u, i]) for u in cluster]
                    slices = torch.stack([old[:, r] if member.dims == (1,) else old[r] for r in rows])
                    made = new[:, rows[0]] if member.dims == (1,) else new[rows[0]]
                    if key == "norm.weight":
                        torch.testing.assert_close(made.abs(), slices.square().mean(0).sqrt() * factor)
                    elif member.dims == (1,) and norm_index is not None:
                        w = model.get_parameter(f"{group.layer}.norm.weight").detach().double()
                        gains = torch.stack([w[norm_index[g, u, i]] for u in cluster])
                        into = updates["norm.weight"].double()[norm_index[g, cluster[0], i]] / factor
                        torch.testing.assert_close(made * into, (slices * gains[:, None]).sum(0))
                    else:
                        expected = slices.sum(0) if member.dims == (1,) else slices.mean(0)
                        torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)
                    for r in rows[1:]:
                        torch.testing.assert_close(
                            new[:, r] if member.dims == (1,) else new[r], old[:, r] if member.dims == (1,) else old[r]
                        )


def test_the_convolution_stays_with_its_head() -> None:
    """A published fault: conv channels regrouped wrongly. Two heads of two B/C groups; one of each stays as it is."""
    model = tiny_model(groups=2, heads_per_group=2, head_dim=4)
    for parameter in model.parameters():
        parameter.data = parameter.data.abs()
    group = next(iter(sspruner.trace(model).on_axis("head").values()))
    keep, updates = scorer_on(model, group).reduce(best(1))
    old = model.backbone.layers[0].mixer.conv1d.weight.detach()  # x: heads (0, 0) (0, 1) (1, 0) (1, 1), then B, C
    for g in range(2):
        first = 8 * g + 4 * int(keep[g].nonzero())
        torch.testing.assert_close(
            updates["conv1d.weight"][first : first + 4], (old[8 * g : 8 * g + 4] + old[8 * g + 4 : 8 * g + 8]) / 2
        )
    assert torch.equal(updates["conv1d.weight"][16:], old[16:])


@st.composite
def row_sets(draw: st.DrawFn) -> torch.Tensor:
    """Unit rows, some of them equal: fp64 (units, elements)."""
    units, kinds = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    rows = torch.randn(kinds, 4, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))), dtype=torch.float64)
    which = torch.tensor([draw(st.integers(0, kinds - 1)) for _ in range(units)])
    return torch.nn.functional.normalize(rows, dim=-1)[which]


@given(row_sets(), st.data())
def test_clusters_are_whole_and_of_nearly_equal_size(rows: torch.Tensor, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(rows)))
    first = data.draw(st.permutations(range(len(rows))))[:count]
    label = _balanced(rows, first)
    sizes = [list(label.values()).count(c) for c in range(count)]
    assert sorted(label) == list(range(len(rows)))
    assert max(sizes) - min(sizes) <= 1
    assert [label[unit] for unit in first] == list(range(count))


@given(row_sets(), st.data())
def test_kmeans_ends_where_no_unit_would_move(rows: torch.Tensor, data: st.DataObject) -> None:
    """No cluster is empty; unless equal rows had to be parted, every unit is with the nearest centre."""
    count = data.draw(st.integers(1, len(rows)))
    first = data.draw(st.permutations(range(len(rows))))[:count]
    label = torch.tensor([_kmeans(rows, first)[unit] for unit in range(len(rows))])
    assert sorted(set(label.tolist())) == list(range(count))
    if len({tuple(row) for row in rows.tolist()}) < count:
        return
    if len({tuple(rows[unit].tolist()) for unit in first}) == count:
        centres = torch.stack([rows[label == c].mean(0) for c in range(count)])
        apart = _distances(rows, centres)
        own = apart.gather(1, label[:, None])[:, 0]
        assert (own <= apart.min(1).values + 1e-9).all()


@examples(20)
@given(st.integers(2, 7), st.integers(1, 3), st.integers(0, 99), st.data())
def test_importance_is_the_distance_to_what_comes_before(
    heads: int, groups: int, seed: int, data: st.DataObject
) -> None:
    """Farthest first: sorted by importance, each unit is the farthest from those before it, and that far. What stays
    is the head of that order; another seed changes nothing unless units are equal."""
    model = tiny_model(heads_per_group=heads, groups=groups, seed=seed, layers=1)
    (group,) = sspruner.trace(model).on_axis("head").values()
    scorer = scorer_on(model, group, seed=seed)
    count = data.draw(st.integers(1, heads))
    keep, _ = scorer.reduce(best(count))
    importance = scorer.importance()
    x = model.backbone.layers[0].mixer.in_proj.weight.detach().double()
    D = groups * heads * 4
    rows = x[D : 2 * D].reshape(groups, heads, -1)
    rows = rows / rows.norm(dim=-1, keepdim=True)
    for g in range(groups):
        order = importance[g].argsort(descending=True).tolist()
        for i in range(1, heads):
            before = [min(float((rows[g, u] - rows[g, v]).norm()) for v in order[:i]) for u in order[i:]]
            assert before[0] == pytest.approx(max(before), abs=1e-9)
            assert float(importance[g, order[i]]) == pytest.approx(before[0], abs=1e-9)
        assert sorted(order[:count]) == keep[g].nonzero().flatten().tolist()
    if heads > 2:  # of two units neither is in the middle
        torch.testing.assert_close(scorer_on(model, group, seed=seed + 1).importance(), importance)


def test_permuting_heads_permutes_scores() -> None:
    model = tiny_model(heads_per_group=5, groups=2, layers=1)
    (group,) = sspruner.trace(model).on_axis("head").values()
    before, order = scorer_on(model, group).importance(), torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        for member in group.members:
            tensor = model.get_parameter(member.tensor)
            front = tensor.movedim(member.dims[0], 0)
            for g in range(2):
                front[member.index[g].flatten()] = front[member.index[g, order].flatten()].clone()
    torch.testing.assert_close(scorer_on(model, group).importance(), before[:, order])


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_zeros_and_equal_heads_give_no_nan(method: str) -> None:
    model = tiny_model(heads_per_group=4)
    with torch.no_grad():
        for layer in model.backbone.layers:
            layer.mixer.in_proj.weight.zero_()
            layer.mixer.norm.weight.zero_()
    for group in sspruner.trace(model).on_axis("head").values():
        scorer = scorer_on(model, group, method)
        assert scorer.importance().isfinite().all()
        keep, updates = scorer.reduce(best(2))
        assert keep.sum() == 2
        assert all(value.isfinite().all() for value in updates.values())


def test_ties_go_by_the_seed_and_the_same_seed_gives_the_same() -> None:
    model = tiny_model(heads_per_group=6, layers=1)
    make_equal(model, "head", [0] * 6)
    (group,) = sspruner.trace(model).on_axis("head").values()
    orders = [scorer_on(model, group, seed=seed).orders for seed in (0, 0, 1, 2, 3)]
    assert orders[0] == orders[1]
    assert len({tuple(order[0]) for order in orders}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_merging_beats_cutting_where_heads_come_in_pairs(method: str) -> None:
    """Heads that are nearly equal: merged logits are nearer to the dense ones than those without half of the heads."""
    model, ids = zoo("falcon_h1", heads=6, mamba_rms_norm=False), tokens()
    make_equal(model, "head", [0, 1, 2, 0, 1, 2])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mamba." in name:
                parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    dense = logits(model, ids)
    joined = logits(merged(model, "head", 3, options={"method": method}).model, ids)
    cut = logits(sspruner.prune(copy.deepcopy(model), "magnitude", axis="head", keep=3, calibration=ids).model, ids)
    assert (joined - dense).abs().max() < 0.2 * (cut - dense).abs().max()


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(sspruner.InputError, match=r"method='median'; known: mean, kmeans"):
        sspruner.score(zoo("mamba2"), "head-merge", axis="head", options={"method": "median"}, calibration=tokens())
