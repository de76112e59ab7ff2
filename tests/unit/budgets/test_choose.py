"""Which units and elements stay: against slow references in plain Python."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner.budgets.allocate import allocate
from sspruner.budgets.budget import ResolvedBudget, pattern_sparsity
from sspruner.budgets.decide import check_budget, choosers
from sspruner.budgets.elements import FLOOR, choose, choose_globally, competing, parse_pattern
from sspruner.graph.group import Block, DependencyGroup
from support.tiny import tiny_model
from support.unit_groups import Scores, random_scores, unit_groups
from support.zoo import zoo

Chooser = Callable[[torch.Tensor], torch.Tensor]

GRAPH = sspruner.trace(tiny_model(layers=3, groups=2, heads_per_group=4, state=8))
SPARSITY = st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.6, 0.75, 0.9, 0.97])
PATTERNS = ["1:2", "2:4", "4:8", "1:3", "2:3"]


@st.composite
def matrices(draw: st.DrawFn, columns: int | None = None) -> torch.Tensor:
    """Few different values, so that there are ties."""
    rows, columns = draw(st.integers(1, 5)), columns or draw(st.integers(1, 9))
    values = draw(st.lists(st.integers(-3, 3), min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(values, dtype=torch.float32).reshape(rows, columns)


@st.composite
def with_rows(draw: st.DrawFn, columns: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    scores = draw(matrices(columns))
    rows = torch.tensor(draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores))))
    return scores, rows


def best(values: list[float], count: int) -> set[int]:
    """Places of the `count` highest; of equal ones the first."""
    return set(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])


def nearest(count: int, target: float) -> bool:
    return abs(count - target) <= 0.5 + 1e-9


@given(with_rows(), SPARSITY)
def test_in_every_row_the_best_stay(drawn: tuple[torch.Tensor, torch.Tensor], sparsity: float) -> None:
    scores, rows = drawn
    keep = choose(scores, rows, sparsity, None, "row")
    counts = set()
    for values, stays, competes in zip(scores.tolist(), keep.tolist(), rows.tolist(), strict=True):
        if competes:
            counts.add(sum(stays))
            assert nearest(sum(stays), len(values) * (1 - sparsity))
            assert best(values, sum(stays)) == {i for i, stay in enumerate(stays) if stay}
        else:
            assert all(stays)
    assert len(counts) <= 1


@given(with_rows(), SPARSITY)
def test_in_a_tensor_the_best_of_all_rows_stay(drawn: tuple[torch.Tensor, torch.Tensor], sparsity: float) -> None:
    scores, rows = drawn
    keep = choose(scores, rows, sparsity, None, "tensor")
    assert keep[~rows].all()
    values, stays = scores[rows].flatten().tolist(), keep[rows].flatten().tolist()
    assert nearest(sum(stays), len(values) * (1 - sparsity))
    assert best(values, sum(stays)) == {i for i, stay in enumerate(stays) if stay}


@given(st.data(), st.sampled_from(PATTERNS))
def test_n_of_every_m_neighbours_stay(data: st.DataObject, pattern: str) -> None:
    n, m = parse_pattern(pattern)
    scores, rows = data.draw(with_rows(m * data.draw(st.integers(1, 3))))
    keep = choose(scores, rows, pattern_sparsity(pattern), pattern, "pattern")
    for values, stays, competes in zip(scores.tolist(), keep.tolist(), rows.tolist(), strict=True):
        if not competes:
            assert all(stays)
            continue
        for start in range(0, len(values), m):
            kept = {i for i, stay in enumerate(stays[start : start + m]) if stay}
            assert len(kept) == n
            assert kept == best(values[start : start + m], n)


@given(st.data(), SPARSITY, st.integers(0, 4))
def test_some_columns_at_once(data: st.DataObject, sparsity: float, seed: int) -> None:
    """As a scorer that works block by block asks: row by row each block is what it would be alone; patterns go on."""
    scores, rows = data.draw(with_rows(12))
    for pattern, granularity in ((None, "row"), (None, "tensor"), ("2:4", "pattern")):
        for start, stop in ((0, 4), (4, 12), (8, 12)):
            block = scores[:, start:stop]
            keep = choose(block, rows, sparsity, pattern, granularity)
            assert keep.shape == block.shape
            assert torch.equal(keep, choose(block.clone(), rows, sparsity, pattern, granularity))
            if pattern:
                assert torch.equal(keep, choose(scores, rows, sparsity, pattern, granularity)[:, start:stop])
    with pytest.raises(sspruner.InputError, match="6 columns at once; pattern 2:4 needs a multiple of 4"):
        choose(scores[:, :6], rows, 0.5, "2:4", "pattern")


@given(st.lists(with_rows(), min_size=1, max_size=4), SPARSITY)
def test_over_all_tensors_the_best_stay_above_a_floor(
    drawn: list[tuple[torch.Tensor, torch.Tensor]], sparsity: float
) -> None:
    scores = {f"t{i}": s for i, (s, _) in enumerate(drawn)}
    rows = {f"t{i}": r for i, (_, r) in enumerate(drawn)}
    keep = choose_globally(scores, rows, sparsity)
    check_globally(scores, rows, sparsity, keep)


def check_globally(scores: Scores, rows: Scores, sparsity: float, keep: Scores) -> None:
    """The slow way: floors first, then the best of all that is left, one by one."""
    share = min(FLOOR, 1 - sparsity)
    places = [(n, i) for n, s in scores.items() for i in range(int(rows[n].sum()) * s.shape[1])]
    values = {n: s[rows[n]].flatten().tolist() for n, s in scores.items()}
    stays = {(n, i) for n, v in values.items() for i in best(v, round(len(v) * share))}
    floors = len(stays)
    for place in sorted(places, key=lambda p: -values[p[0]][p[1]]):  # stable: of equal ones the first
        if len(stays) < round(len(places) * (1 - sparsity)):
            stays.add(place)
    assert len(stays) == max(floors, round(len(places) * (1 - sparsity)))
    for name in scores:
        found = {(name, i) for i, stay in enumerate(keep[name][rows[name]].flatten().tolist()) if stay}
        assert found == {place for place in stays if place[0] == name}
        assert keep[name][~rows[name]].all()


def test_the_floor_is_what_a_worthless_tensor_keeps() -> None:
    scores = {"good": torch.rand(20, 20) + 9, "bad": torch.rand(10, 20)}
    rows = {name: torch.ones(len(s), dtype=torch.bool) for name, s in scores.items()}
    for sparsity in (0.5, 0.8, 0.9):
        keep = choose_globally(scores, rows, sparsity)
        assert keep["bad"].sum() == 10  # 5 % of 200
        assert keep["good"].sum() == round(600 * (1 - sparsity)) - 10
        assert scores["bad"][keep["bad"]].min() >= scores["bad"][~keep["bad"]].max()
    assert choose_globally(scores, rows, 0.98)["bad"].sum() == 4  # less than the floor: 2 % of everything


# Whole budgets, through the same function as `prune` and `plan`


def elements(**shapes: tuple[int, int]) -> dict[str, DependencyGroup]:
    runs = {"B": torch.tensor([0, 1]), "C": torch.tensor([2])}
    return {
        f"{n}:weight": DependencyGroup(n, "weight", *s, (), tensor=f"{n}.weight", runs=runs if s[0] > 3 else {})
        for n, s in shapes.items()
    }


def kept(
    groups: dict[str, DependencyGroup], budget: ResolvedBudget, granularity: str, scores: Scores | None = None
) -> Scores:
    if scores is None:
        torch.manual_seed(0)
        scores = {n: torch.rand(g.groups, g.units) for n, g in groups.items()}
    choose = choosers(groups, budget, dict.fromkeys({g.axis for g in groups.values()}, granularity), scores)
    return {n: choose[n](scores[n]) for n in groups}


def test_a_scorers_granularity_and_the_users() -> None:
    groups = elements(a=(4, 8), b=(6, 8), c=(2, 12))
    rows = kept(groups, ResolvedBudget(0.5), "row")
    assert all((keep.sum(1) * 2 == keep.shape[1]).all() for keep in rows.values())
    tensors = kept(groups, ResolvedBudget(0.5), "tensor")
    assert all(keep.sum() * 2 == keep.numel() for keep in tensors.values())
    assert not all((keep.sum(1) * 2 == keep.shape[1]).all() for keep in tensors.values())
    together = kept(groups, ResolvedBudget(0.5), "global")
    assert sum(int(keep.sum()) for keep in together.values()) == 52
    assert not all(keep.sum() * 2 == keep.numel() for keep in together.values())
    for asked, expected in (("row", rows), ("tensor", tensors), ("global", together)):
        for own in ("row", "tensor", "global"):
            found = kept(groups, ResolvedBudget(0.5, granularity=asked), own)
            assert all(torch.equal(found[n], expected[n]) for n in groups)
    assert ResolvedBudget(0.5).compares_layers(groups, {"weight": "global"})
    assert not ResolvedBudget(0.5, granularity="row").compares_layers(groups, {"weight": "global"})
    assert not ResolvedBudget(0.5, pattern="2:4").compares_layers(groups, {"weight": "global"})


def test_ratios_and_ignored_tensors() -> None:
    groups = elements(a=(4, 8), b=(6, 8), c=(2, 12))
    found = kept(groups, ResolvedBudget(0.5, ratios={"b": 0.75}, ignore=["c"]), "tensor")
    assert {n: int(k.sum()) for n, k in found.items()} == {"a:weight": 16, "b:weight": 12, "c:weight": 24}
    found = kept(groups, ResolvedBudget(0.5, ratios={"b": 0.75}), "global")  # another fraction, another pool
    assert int(found["b:weight"].sum()) == 12
    assert int(found["a:weight"].sum() + found["c:weight"].sum()) == 28
    found = kept(groups, ResolvedBudget(0.5, pattern="2:4", ratios={"c": 0}), "tensor")
    assert all((found[f"{n}:weight"].unflatten(1, (-1, 4)).sum(-1) == 2).all() for n in "ab")
    assert found["c:weight"].all()


def test_two_axes_have_a_threshold_each() -> None:
    """Scores of A_log and of weights are not of one kind, and may come from two scorers."""
    groups = elements(a=(4, 8), b=(6, 8))
    groups["m:decay"] = DependencyGroup("m", "decay", 5, 4, (), tensor="m.A_log")
    scores = {n: torch.rand(g.groups, g.units) + (100 if g.axis == "decay" else 0) for n, g in groups.items()}
    found = kept(groups, ResolvedBudget({"weight": 0.5, "decay": 0.5}), "global", scores)
    assert int(found["m:decay"].sum()) == 10
    assert int(found["a:weight"].sum() + found["b:weight"].sum()) == 40


def test_named_rows_compete_and_others_stay() -> None:
    groups = elements(a=(4, 8), b=(6, 8), c=(2, 12))
    for granularity in ("row", "tensor", "global"):
        found = kept(groups, ResolvedBudget(0.5, rows=["B", "C"]), granularity)
        assert all(keep[3:].all() for keep in found.values())
        assert found["c:weight"].all()  # it has no such rows
        assert int(sum((~keep).sum() for keep in found.values())) == 24
    assert int((~kept(groups, ResolvedBudget(0.5, rows=["C"]), "row")["a:weight"]).sum()) == 4
    assert competing(groups["a:weight"], ("C",)).tolist() == [False, False, True, False]
    assert competing(groups["a:weight"], ()).all()


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"pattern": "4:2"}, "pattern '4:2': expected N:M with 0 < N < M"),
        ({"pattern": "2:2"}, "expected N:M"),
        ({"pattern": "0:4"}, "expected N:M"),
        ({"pattern": "a"}, "pattern 'a': expected N:M"),
        ({"pattern": "2:4:8"}, "expected N:M"),
        ({"pattern": "-1:4"}, "expected N:M"),
        (
            {"pattern": "2:5", "sparsity": 0.6},
            "rows of 8 elements; pattern 2:5 needs a multiple of 5; leave it out with ignore",
        ),
        ({"pattern": "2:4", "sparsity": 0.3}, "pattern 2:4 removes 0.5, not 0.3; leave one out"),
        ({"pattern": "2:4", "sparsity": {"weight": 0.3}}, "pattern 2:4 removes 0.5, not 0.3; leave one out"),
        ({"pattern": "2:4", "ratios": {"a": 0.75}}, "a:weight: pattern 2:4 removes 0.5, not 0.75"),
        ({"pattern": "2:4", "granularity": "row"}, "pattern 2:4 compares 4 elements; leave out granularity"),
        ({"granularity": "column"}, "unknown granularity 'column'; known: row, tensor, global"),
        ({"rows": ["E"]}, "rows 'E': no tensor has such rows; these are known: B, C"),
        ({"keep": 4}, "keep counts units; of single elements give the fraction to remove"),
        ({"keep": 4, "pattern": "2:4"}, "keep counts units"),
        ({"ratios": {"x": 0.5}}, "pattern 'x': matches nothing that is cut"),
    ],
)
def test_impossible_budgets_of_elements(budget: dict, message: str) -> None:
    """Before any work, and where the plan is made."""
    groups = elements(a=(4, 8), b=(6, 8))
    pattern = budget.get("pattern", "")
    given = {"sparsity": 0.5} if "sparsity" not in budget and "keep" not in budget else {}
    for job in (lambda b: check_budget(groups, b), lambda b: kept(groups, b, "tensor")):
        with pytest.raises(sspruner.InputError, match=message.replace("(", r"\(")):
            job(ResolvedBudget(**given, **budget))
    if pattern and "expected" in message:
        with pytest.raises(sspruner.InputError, match="expected N:M"):
            pattern_sparsity(pattern)


@pytest.mark.parametrize("option", [{"pattern": "2:4"}, {"granularity": "row"}, {"rows": ["B"]}])
def test_what_is_for_elements_is_refused_where_units_are_cut(option: dict) -> None:
    groups = GRAPH.on_axis("state")
    with pytest.raises(sspruner.InputError, match="pattern, granularity and rows are for single elements: axis weight"):
        check_budget(groups, ResolvedBudget(0.5, **option))


def test_nothing_to_remove_from_elements() -> None:
    groups = elements(a=(4, 8), b=(6, 8))
    for budget in (ResolvedBudget(0), ResolvedBudget(0.5, ignore=["*"]), ResolvedBudget({"weight": 0})):
        with pytest.raises(sspruner.InputError, match="the budget removes nothing"):
            check_budget(groups, budget)


# The allocation "global"


def ranks(scores: torch.Tensor) -> list[float]:
    """The mean over sets of the best, of the second, and so on."""
    best_first = [sorted(row, reverse=True) for row in scores.double().tolist()]
    return [sum(column) / len(column) for column in zip(*best_first, strict=True)]


SETS = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 6)), min_size=1, max_size=3)


@given(SETS, SPARSITY, st.integers(1, 3), st.integers(0, 99))
def test_a_global_allocation_is_the_best_of_all_possible_ones(
    shapes: list[tuple[int, int]], sparsity: float, step: int, seed: int
) -> None:
    """Of all counts that steps allow, those are as near to the budget as a threshold on the score can come."""
    groups = unit_groups(*shapes)
    scores = random_scores(groups, seed)
    counts = allocate(groups, ResolvedBudget(sparsity, allocation="global", multiple_of=step), scores)
    target = sum(g * u for g, u in shapes) * (1 - sparsity)
    allowed = [sorted({*range(step, units + 1, step), units}) for _, units in shapes]
    assert all(count in can for count, can in zip(counts.values(), allowed, strict=True))

    def worth(name: str, start: int, stop: int) -> float:
        part = ranks(scores[name])[start:stop]
        return sum(part) / len(part)

    # The slow way: from the least that may stay, the step that is worth most goes back, one after the other.
    now = {n: can[0] for n, can in zip(groups, allowed, strict=True)}
    path = [dict(now)]
    larger = {n: dict(itertools.pairwise(can)) for n, can in zip(groups, allowed, strict=True)}
    while any(now[n] in larger[n] for n in groups):
        options = {n: worth(n, now[n], larger[n][now[n]]) for n in groups if now[n] in larger[n]}
        name = max(options, key=options.__getitem__)
        now[name] = larger[name][now[name]]
        path.append(dict(now))

    def away(c: dict[str, int]) -> float:
        return abs(sum(groups[n].groups * k for n, k in c.items()) - target)

    assert counts in path
    assert away(counts) == pytest.approx(min(map(away, path)))


@given(SETS, SPARSITY, st.integers(0, 99))
def test_what_stays_is_worth_more_than_what_goes(shapes: list[tuple[int, int]], sparsity: float, seed: int) -> None:
    groups = unit_groups(*shapes)
    scores = random_scores(groups, seed)
    counts = allocate(groups, ResolvedBudget(sparsity, allocation="global"), scores)
    stays = [w for n in groups for w in ranks(scores[n])[1 : counts[n]]]  # the first one stays in any case
    goes = [w for n in groups for w in ranks(scores[n])[counts[n] :]]
    assert min(counts.values()) >= 1
    assert not stays or not goes or min(stays) >= max(goes)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(2, 12), st.integers(1, 11), st.integers(0, 99))
def test_layers_with_the_same_scores_lose_the_same(layers: int, sets: int, units: int, keep: int, seed: int) -> None:
    """In any order of the units."""
    if keep >= units:
        return
    groups = unit_groups(*[(sets, units)] * layers)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randperm(units, generator=generator).float()
    scores = {n: torch.stack([values[torch.randperm(units, generator=generator)] for _ in range(sets)]) for n in groups}
    for step in (1, 2):
        asked = keep // step * step
        if asked:
            budget = ResolvedBudget(1 - asked / units, multiple_of=step)
            uniform = allocate(groups, budget, scores)
            assert allocate(groups, replace(budget, allocation="global"), scores) == uniform
            assert set(uniform.values()) == {asked}


def test_what_is_named_is_not_in_the_pool() -> None:
    groups = unit_groups((1, 10), (1, 10), (1, 10), (1, 10))
    scores = {n: torch.full((1, 10), float(i)) + torch.rand(1, 10) / 2 for i, n in enumerate(groups)}
    budget = ResolvedBudget(0.5, allocation="global", ratios={"l3": 0.8}, ignore=["l2"])
    # l0 and l1 compete alone: l1 is the better one, l0 keeps one
    assert allocate(groups, budget, scores) == {"l0:state": 1, "l1:state": 9, "l2:state": 10, "l3:state": 2}
    assert allocate(groups, ResolvedBudget(0.5, allocation="global"), scores) == {
        "l0:state": 1, "l1:state": 1, "l2:state": 8, "l3:state": 10,
    }  # fmt: skip


def test_axes_have_a_pool_each_and_whole_modules_none() -> None:
    groups = unit_groups((2, 8), (2, 8)) | unit_groups((1, 4), (1, 4), axis="head")
    blocks = tuple(Block(f"b.{i}", ()) for i in range(4))
    groups["b:block"] = DependencyGroup("b", "block", 1, 4, (), blocks=blocks)
    groups["m:hidden"] = DependencyGroup("m", "hidden", 1, 12, ())
    scores = {n: torch.rand(g.groups, g.units) + 9 * (g.axis == "head") for n, g in groups.items()}
    sparsity = {"state": 0.25, "head": 0.5, "block": 0.5, "hidden": 0.25}
    counts = allocate(groups, ResolvedBudget(sparsity, allocation="global"), scores)
    assert 2 * (counts["l0:state"] + counts["l1:state"]) == 24
    assert counts["l0:head"] + counts["l1:head"] == 4
    assert (counts["b:block"], counts["m:hidden"]) == (2, 9)
    with pytest.raises(sspruner.InputError, match=r"m:hidden: 0\.01 removes nothing from 12 units"):
        allocate(groups, ResolvedBudget({**sparsity, "hidden": 0.01}, allocation="global"), scores)


def test_multiples_asked_for_and_a_groups_own() -> None:
    groups = unit_groups((1, 24), (1, 24), own=4) | {"x:state": DependencyGroup("x", "state", 1, 9, ())}
    counts = allocate(groups, ResolvedBudget(0.5, allocation="global", multiple_of=6), random_scores(groups, 1))
    assert all(counts[n] in (12, 24) for n in ("l0:state", "l1:state"))
    assert counts["x:state"] in (6, 9)


@pytest.mark.parametrize(
    ("units", "step", "sets"),
    [(24, 11, [8.223114967346191, 1.2203997373580933, 1.5674388408660889]), (31, 8, [3.7415762, 0.23700953, 4.910129])],
)
def test_a_short_last_step_of_equal_units_comes_last(units: int, step: int, sets: list[float]) -> None:
    """Its mean is another rounding of the same number, here a larger one."""
    groups = unit_groups((3, units), (3, units))
    scores = {n: torch.tensor(sets)[:, None].expand(-1, units) for n in groups}
    for keep in range(1, units):
        counts = allocate(groups, ResolvedBudget(1 - keep / units, allocation="global", multiple_of=step), scores)
        assert all(count % step == 0 or count == units for count in counts.values())


def test_a_good_layer_may_stay_whole_and_a_bad_one_keeps_a_multiple() -> None:
    groups = unit_groups((2, 8), (2, 8), (2, 8))
    scores = {n: torch.rand(2, 8) + 5 * i for i, n in enumerate(groups)}
    for step, expected in ((1, [1, 3, 8]), (2, [2, 2, 8]), (4, [4, 4, 4])):
        counts = allocate(groups, ResolvedBudget(0.5, allocation="global", multiple_of=step), scores)
        assert list(counts.values()) == expected, step


def test_a_mean_over_sets_and_not_the_best_set() -> None:
    groups = unit_groups((2, 2), (2, 2))
    scores = {"l0:state": torch.tensor([[9.0, 8.0], [0.0, 0.0]]), "l1:state": torch.tensor([[5.0, 5.0], [5.0, 5.0]])}
    assert allocate(groups, ResolvedBudget(0.25, allocation="global"), scores) == {"l0:state": 1, "l1:state": 2}


def test_a_global_budget_may_be_finer_than_a_layer() -> None:
    """0.03 of 48 states is one: too little for every layer, enough for one; `prune` asks the same before any work."""
    groups = unit_groups((1, 16), (1, 16), (1, 16))
    budget = ResolvedBudget(0.03, allocation="global")
    check_budget(groups, budget)
    assert sorted(allocate(groups, budget, random_scores(groups, 0)).values()) == [15, 16, 16]
    with pytest.raises(sspruner.InputError, match="removes nothing from 16 units"):
        check_budget(groups, replace(budget, allocation="uniform"))
    with pytest.raises(sspruner.InputError, match="the budget removes nothing"):
        check_budget(groups, replace(budget, sparsity=0.003))


def test_global_needs_scores_and_no_keep() -> None:
    groups = unit_groups((1, 8))
    with pytest.raises(sspruner.InputError, match="their scores have to be known before any is cut"):
        allocate(groups, ResolvedBudget(0.5, allocation="global"))
    with pytest.raises(sspruner.InputError, match="keep says how many units stay in every layer"):
        ResolvedBudget(keep=4, allocation="global")
    with pytest.raises(sspruner.InputError, match="compete: their scores have to be known"):
        choosers(elements(a=(4, 8)), ResolvedBudget(0.5), {"weight": "global"})


@given(st.integers(0, 99), SPARSITY)
def test_a_global_plan_keeps_the_best_units_of_every_layer(seed: int, sparsity: float) -> None:
    """Through `sspruner.plan`, on a real graph: what a layer keeps are its own best."""
    groups = GRAPH.on_axis("state")
    scores = random_scores(groups, seed)
    made = sspruner.plan(GRAPH, sspruner.Scores(scores), sparsity=sparsity, allocation="global")
    counts = allocate(groups, ResolvedBudget(sparsity, allocation="global"), scores)
    assert {n: s.after for n, s in made.groups.items()} == {n: c for n, c in counts.items() if c < 8}
    for name, selection in made.groups.items():
        for row, stay in zip(scores[name].tolist(), selection.keep, strict=True):
            assert set(stay) == best(row, counts[name])
    assert made.made_by["allocation"] == "global"
    total = sum(c * groups[n].groups for n, c in counts.items())
    assert abs(total - 48 * (1 - sparsity)) <= 1 or math.isclose(min(counts.values()), 1)


def test_global_prune_is_one_shot() -> None:
    model = zoo("mamba2")
    ids = torch.randint(31, (4, 19), generator=torch.Generator().manual_seed(0))
    data = sspruner.calibration(ids, model)
    result = sspruner.prune(model, "ghost", sparsity=0.5, allocation="global", calibration=data)
    assert result.report.one_shot
    assert result.report.budget["allocation"] == "global"
    dense = zoo("mamba2")
    made = sspruner.plan(
        sspruner.trace(dense), sspruner.score(dense, "ghost", calibration=data), sparsity=0.5, allocation="global"
    )
    assert result.plan.groups == made.groups
    kept = sum(s["after"] for s in result.report.layers.values())
    assert kept == 9
