"""Recipes as YAML: what is written is read, what flags accept as text is accepted, and errors name the key's path."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sspruner.errors import InputError
from sspruner.recipes.parts import Budget, CalibrationText, Elements, Limits, Method, Reconstruction, Remove, Target
from sspruner.recipes.recipe import Recipe
from sspruner.recipes.serving import Serving


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "r.yaml"


def load(file: Path, text: str) -> Recipe:
    file.write_text(text, encoding="utf-8")
    return Recipe.load(file)


EVERYTHING = Recipe(
    Remove(axis={"state": 0.5, "head": 0.25}, ignore=("layers.0.*", "ö")),
    Elements(pattern="2:4", granularity="row", rows=("B",)),
    Budget("global", "none", 2, {"a": 0.25}, {"*": 4}, {"b": 8}, 0.5, 3),
    Limits(
        state_bytes=25e6, max_batch=2, memory=8e10, state_memory=2e9, parameters=0.8, perplexity_increase=0.01, kl=0.1
    ),
    Method({"variant": "means", "n": [1, None]}, 7, "mask", "bias", {"state": "ghost"}, "select", True),
    Reconstruction(100, 64, 5.0),
    CalibrationText("text.txt", 4, 64, "body"),
    Target("vllm", 2),
    Serving("float16", "fp8", True, 3, True, 512),
)


def test_every_field_differs_from_its_default() -> None:
    """So that none is forgotten below."""
    for name, part in vars(EVERYTHING).items():
        default = getattr(Recipe(), name)
        assert all(value != getattr(default, key) for key, value in vars(part).items()), name


@pytest.mark.parametrize("recipe", [Recipe(), EVERYTHING], ids=["defaults", "everything"])
def test_what_is_written_is_read(recipe: Recipe, file: Path) -> None:
    recipe.save(file)
    assert Recipe.load(file) == recipe
    assert yaml.safe_load(file.read_text(encoding="utf-8")) == recipe.to_json()


def test_nothing_is_the_default(file: Path) -> None:
    for text in ("", "{}", "budget:", "budget: {sparsity: null}", "remove: {axis: ~}"):
        assert load(file, text) == Recipe()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("remove: {axis: 'state=0.5,head=0.25'}", Recipe(Remove({"state": 0.5, "head": 0.25}))),
        ("remove: {axis: head, ignore: layers.0.*}", Recipe(Remove("head", ("layers.0.*",)))),
        ("remove: {ignore: [a, b]}", Recipe(Remove(ignore=("a", "b")))),
        ("elements: {rows: B, pattern: '2:4'}", Recipe(elements=Elements("2:4", rows=("B",)))),
        ("budget: {ratios: ['a=0.25', 'b=0.5,c=0.1', 'a=0.3']}",
         Recipe(budget=Budget(ratios={"a": 0.3, "b": 0.5, "c": 0.1}))),
        ("budget: {ratios: 'layers.0.*=0.25'}", Recipe(budget=Budget(ratios={"layers.0.*": 0.25}))),
        ("budget: {floor: 16, cap: '32'}", Recipe(budget=Budget(floor={"*": 16}, cap={"*": 32}))),
        ("budget: {floor: ['8', 'a=16']}", Recipe(budget=Budget(floor={"*": 8, "a": 16}))),
        ("budget: {floor: {a: 16}, sparsity: 1e-1}", Recipe(budget=Budget(floor={"a": 16}, sparsity=0.1))),
        ("limits: {state_bytes: 25MB, perplexity_increase: 1%}",
         Recipe(limits=Limits(state_bytes=25e6, perplexity_increase=0.01))),
        ("limits: {parameters: 0.8x}", Recipe(limits=Limits(parameters=0.8))),
        ("serving: {context: 4k, spec: 2}", Recipe(serving=Serving(context=4096, spec=2))),
        ("limits: {max_batch: 2, memory: 80GB}", Recipe(limits=Limits(max_batch=2, memory=8e10))),
        ("method: {scorer: 'state=ghost,mlp=magnitude'}",
         Recipe(method=Method(scorer={"state": "ghost", "mlp": "magnitude"}))),
        ("method: {options: ['variant=means', 'n=3']}", Recipe(method=Method({"variant": "means", "n": 3}))),
        ("method: {options: variant=means, refit: none, one_shot: yes}",
         Recipe(method=Method({"variant": "means"}, one_shot=True))),
    ],
)  # fmt: skip
def test_texts_of_flags_are_accepted(text: str, expected: Recipe, file: Path) -> None:
    assert load(file, text) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a", "the file: expected keys and values, not [a]"),
        ("a: [", "not YAML ("),
        ("a: &a {b: *a}", "not YAML ("),
        ("budget: 3", "budget: expected keys and values, not 3"),
        ("budgte: {}", "unknown key budgte; did you mean 'budget'?"),
        ("zzz: {}", "unknown key zzz; known: budget, calibration, elements, limits, method, reconstruction, remove, "),
        ("budget: {sparsty: 0.5}", "unknown key budget.sparsty; did you mean 'sparsity'?"),
        ("budget: {sparsity: half}", "budget.sparsity half: expected a number"),
        ("budget: {keep: 2.5}", "budget.keep 2.5: expected a whole number"),
        ("budget: {keep: yes}", "budget.keep: expected no true; write a word in quotes"),
        ("remove: {ignore: no}", "remove.ignore: expected no false; write a word in quotes"),
        ("budget: {ratios: {a: x}}", "budget.ratios.a x: expected a number"),
        ("budget: {ratios: [a]}", "budget.ratios 'a': expected NAME=VALUE"),
        ("budget: {floor: {a: x}}", "budget.floor.a x: expected a whole number"),
        ("budget: {floor: x}", "budget.floor ['x']: expected UNITS or PATTERN=UNITS, a whole number"),
        ("remove: {axis: state=x}", "remove.axis 'state=x': 'x' is not a number"),
        ("remove: {axis: {state: x}}", "remove.axis.state x: expected a number"),
        ("remove: {axis: [state]}", "remove.axis [state]: expected text"),
        ("remove: {ignore: [a, 5]}", "remove.ignore.1 5: expected text; write it in quotes"),
        ("elements: {pattern: 2:4}", "elements.pattern: YAML reads 2:4 without quotes as 124; write it in quotes"),
        ("calibration: {source: 2026-11-28}", "calibration.source 2026-11-28: expected text; write it in quotes"),
        ("method: {one_shot: maybe}", "method.one_shot maybe: expected true or false"),
        ("method: {options: 5}", "method.options 5: expected keys and values"),
        ("method: {options: [a]}", "method.options 'a': expected name=value"),
        ("limits: {memory: 5 apples, max_batch: 2}", "limits.memory '5 apples': expected a size such as 25MB"),
        ("limits: {max_batch: 2}", "max-batch and memory go together"),
        ("limits: {kl: -1}", "kl -1.0: must be a number above 0"),
        ("budget: {keep: 1}\nbudget: {keep: 2}", "not YAML (the key budget is there twice"),
    ],
)  # fmt: skip
def test_errors_name_the_file_and_the_key(text: str, says: str, file: Path) -> None:
    with pytest.raises(InputError) as error:
        load(file, text)
    assert str(error.value).startswith(f"recipe {file}: {says}")
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no\.yaml: cannot be read \(No such file"):
        Recipe.load(tmp_path / "no.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        Recipe.load(tmp_path)
