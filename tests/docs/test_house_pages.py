"""Pages that repeat what the code says: recipes, floors, public names."""

from __future__ import annotations

import re
import tomllib

import pytest
import yaml

import sspruner
from sspruner.recipes.recipe import Recipe
from sspruner.recipes.train import DistilRecipe
from sspruner.recipes.yaml import from_data
from support.paths import ROOT
from support.recipe_reference import PAGE, recipes, with_tables

DOCS = ROOT / "docs"


@pytest.mark.slow
def test_keys_of_recipes_are_those_of_the_dataclasses() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert with_tables(text) == text, "write them anew: python tests/support/recipe_reference.py"
    shown = {name.partition(".")[0] for name in re.findall(r"<!-- keys of ([\w.]+) -->", text)}
    assert shown == set(recipes())


def test_recipes_in_yaml_are_recipes() -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    first, second, *others = map(yaml.safe_load, blocks)
    assert not others
    assert from_data(Recipe, first).budget.sparsity == first["budget"]["sparsity"]
    assert from_data(DistilRecipe, second).method.teacher == second["method"]["teacher"]


def test_the_floors_are_those_of_the_contract() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (layers,) = [c["layers"] for c in pyproject["tool"]["importlinter"]["contracts"] if c["name"] == "Floors"]
    floors = {len(layers) - i: set(layer.split(" | ")) for i, layer in enumerate(layers)}
    listed: dict[int, set[str]] = {}
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", (DOCS / "architecture.md").read_text(encoding="utf-8"), re.M)
    for floor, names in rows:
        listed.setdefault(int(floor), set()).update(re.findall(r"`sspruner/(\w+?)(?:\.py)?`", names))
    assert listed == floors


def test_the_table_of_public_names_is_complete() -> None:
    text = (DOCS / "api/index.md").read_text(encoding="utf-8").partition("\n## Python names\n")[2]
    table = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    assert set(re.findall(r"`sspruner\.(\w+)`", table)) == set(sspruner.__all__)
