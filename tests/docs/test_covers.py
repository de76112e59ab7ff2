"""What a cover of a test's cases holds (tests/support/cover.py)."""

from __future__ import annotations

from itertools import product

from support.cover import cover

AXES = ["state", "head", "mlp"]
FAMILIES = [f"family{i}" for i in range(10)]
CASES = [{"family": family, "axis": axis} for family, axis in product(FAMILIES, AXES)]


def test_every_value_of_the_other_parameters_and_so_many_families() -> None:
    for families in (3, 5, 10):
        chosen = [CASES[i] for i in cover(CASES, "a test", families)]
        assert {case["axis"] for case in chosen} == set(AXES)
        assert len({case["family"] for case in chosen}) == len(chosen) == families


def test_a_value_that_few_cases_have_is_not_lost() -> None:
    rare = [*CASES, {"family": "family0", "axis": "group"}]
    assert len(rare) - 1 in cover(rare, "a test")


def test_values_of_a_single_parameter() -> None:
    alone = [{"fault": str(i)} for i in range(20)]
    assert len(cover(alone, "a test", families=4)) == 4
    assert len(cover(alone[:2], "a test", families=4)) == 2


def test_no_more_and_no_fewer_than_asked_for() -> None:
    own = [{"text": str(i), "says": str(-i)} for i in range(20)]
    assert len(cover(own, "a test")) == 20
    assert len(cover(own, "a test", most=6)) == 6
    assert len(cover(CASES, "a test", least=17)) == 17
    assert len(cover(CASES[:9], "a test", least=17)) == 9


def test_tests_choose_differently_and_always_the_same() -> None:
    names = [f"test {i}" for i in range(30)]
    chosen = [frozenset(CASES[i]["family"] for i in cover(CASES, name)) for name in names]
    assert frozenset.union(*chosen) == set(FAMILIES)
    assert chosen == [frozenset(CASES[i]["family"] for i in cover(CASES, name)) for name in names]
