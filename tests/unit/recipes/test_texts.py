"""The short texts of options mean the same in Python, and wrong ones say what was expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sspruner.errors import InputError
from sspruner.recipes import texts
from sspruner.recipes.measure import BenchOptions, EvaluateOptions
from sspruner.recipes.parts import Limits
from sspruner.recipes.recipe import Recipe
from sspruner.recipes.train import DistilRecipe, GradualRecipe, TwistRecipe


def test_python_takes_texts() -> None:
    recipe = Recipe.of(
        "state=ghost", axis="state=0.5", ignore="a", floor=16, cap=["b=3"], ratios=["a=0.1"], options="x=1"
    )
    assert recipe.method.scorer == {"state": "ghost"}
    assert recipe.remove.axis == {"state": 0.5}
    assert recipe.remove.ignore == ("a",)
    assert (recipe.budget.floor, recipe.budget.cap, recipe.budget.ratios) == ({"*": 16}, {"b": 3}, {"a": 0.1})
    assert recipe.method.options == {"x": 1}
    assert Limits(state_bytes="25MB").state_bytes == 25e6


def test_python_takes_values_as_they_are() -> None:
    recipe = Recipe.of(axis={"state": 0.5}, ignore=["a"], rows=("B",), floor={"a": 1}, ratios={}, options={"x": object})
    assert recipe.remove.axis == {"state": 0.5}
    assert recipe.remove.ignore == ("a",)
    assert recipe.budget.floor == {"a": 1}
    assert recipe.method.options == {"x": object}
    assert Recipe.of().remove.axis == "state"


@pytest.mark.parametrize(
    ("read", "given", "expected"),
    [
        (texts.fractions_by_axis, "state", "state"),
        (texts.fractions_by_axis, "a=0.5, b=1e-1", {"a": 0.5, "b": 0.1}),
        (texts.fractions_by_pattern, "a=b=0.5", {"a=b": 0.5}),
        (texts.fractions_by_pattern, (), {}),
        (texts.units_by_pattern, ["3", "a=4,b=5"], {"*": 3, "a": 4, "b": 5}),
        (texts.names_by_axis, "ghost", "ghost"),
        (texts.values_by_name, ["a=1", "b=x=y", "c=[1, 2]", "d="], {"a": 1, "b": "x=y", "c": [1, 2], "d": ""}),
        (texts.several, "a,b", ("a,b",)),
        (texts.bytes_of, "1kB", 1000),
        (texts.bytes_of, 7, 7),
        (texts.parameters_of, "0.8x", 0.8),
        (texts.increase_of, "2%", 0.02),
    ],
)
def test_texts(read: Callable[[Any, str], Any], given: Any, expected: Any) -> None:
    assert read(given, "--x") == expected


@pytest.mark.parametrize(
    ("read", "given", "says"),
    [
        (texts.fractions_by_axis, "a,b", "--x 'a,b': expected NAME=VALUE, several separated by commas, each name once"),
        (texts.fractions_by_axis, "a=1,a=2", "--x 'a=1,a=2': expected NAME=VALUE"),
        (texts.fractions_by_axis, "a=", "--x 'a=': '' is not a number"),
        (texts.fractions_by_pattern, ["a=1", "b=x"], "--x b=x: 'x' is not a number"),
        (texts.units_by_pattern, "a=1.5", "--x ['a=1.5']: expected UNITS or PATTERN=UNITS, a whole number"),
        (texts.names_by_axis, "a=b,c", "--x 'a=b,c': expected NAME=VALUE"),
        (texts.values_by_name, "a", "--x 'a': expected name=value"),
        (texts.values_by_name, "=1", "--x '=1': expected name=value"),
        (texts.pattern_of, 124, "--x: YAML reads 2:4 without quotes as 124; write it in quotes: '2:4'"),
    ],
)
def test_wrong_texts(read: Callable[[Any, str], Any], given: Any, says: str) -> None:
    with pytest.raises(InputError) as error:
        read(given, "--x")
    assert str(error.value).startswith(says)


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 10**20])
@pytest.mark.parametrize("recipe", [Recipe, EvaluateOptions, BenchOptions, DistilRecipe, GradualRecipe, TwistRecipe])
def test_a_seed_that_generators_do_not_take_is_refused(recipe: Any, seed: int) -> None:
    with pytest.raises(InputError, match=f"seed {seed}: must fit in 64 bits"):
        recipe.of(seed=seed)
    recipe.of(seed=2**63 - 1)
