"""`--recipe FILE`: its values where no flag is given; the recipe of a run is beside its result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sspruner.cli.main import app
from sspruner.recipes.recipe import Recipe
from support.cli_reference import commands
from support.command import TEXT, done, refused, run, saved_model

EVERYTHING = """
remove: {axis: {state: 0.5, head: 0.25}, ignore: ["layers.0.*"]}
elements: {granularity: row, rows: B}
budget: {allocation: global, normalise: none, multiple_of: 2, ratios: ["a=0.25"], floor: 4, cap: {b: 8}}
method: {scorer: {state: ghost, head: magnitude}, options: {variant: means}, seed: 3, mode: mask, one_shot: true}
calibration: {source: text.txt, samples: 2, seq_len: 32}
target: {runtime: vllm, tp: 2}
"""


def parsed(*words: object) -> Recipe:
    """The recipe of `sspruner prune WORDS`."""
    _, bound, _ = app.parse_args(["prune", *map(str, words)], exit_on_error=False, print_error=False)
    recipe: Recipe = bound.kwargs.get("recipe", Recipe())
    return recipe


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "r.yaml"


def test_every_value_is_taken(file: Path) -> None:
    file.write_text(EVERYTHING, encoding="utf-8")
    assert parsed("--recipe", file) == Recipe.load(file)
    assert Recipe.load(file).method.one_shot


def test_flags_override(file: Path) -> None:
    file.write_text(EVERYTHING, encoding="utf-8")
    recipe = parsed(
        "--recipe", file, "--seed", "0", "--floor", "7", "--axis", "head", "--keep", "5", "--scorer", "ghost"
    )
    assert (recipe.method.seed, recipe.budget.floor, recipe.remove.axis) == (0, {"*": 7}, "head")
    assert (recipe.budget.keep, recipe.method.scorer) == (5, "ghost")
    assert recipe.budget.cap == {"b": 8}
    assert recipe.calibration.seq_len == 32


@pytest.mark.parametrize(
    ("said", "flags", "expected"),
    [
        ("budget: {sparsity: 0.5}", "--keep 5", {"keep": 5}),
        ("budget: {keep: 5}", "--sparsity 0.25", {"sparsity": 0.25}),
        ("budget: {keep: 5}", "--max-kl 0.1", {"kl": 0.1}),
        ("limits: {kl: 0.1, state_bytes: 25MB}", "--keep 5", {"keep": 5}),
        ("limits: {kl: 0.1}", "--state-bytes 1MB", {"kl": 0.1, "state_bytes": 1e6}),
        ("limits: {max_batch: 2, memory: 4GB}", "--max-batch 8", {"max_batch": 8, "memory": 4e9}),
        ("elements: {pattern: '2:4'}", "--sparsity 0.25", {"sparsity": 0.25}),
        ("budget: {sparsity: 0.5}", "--seed 1", {"sparsity": 0.5}),
    ],
)
def test_how_much_is_said_once(said: str, flags: str, expected: dict[str, Any], file: Path) -> None:
    """A flag that says how much takes the place of what the file says in another way."""
    file.write_text(said, encoding="utf-8")
    recipe = parsed("--recipe", file, *flags.split())
    data = recipe.to_json()
    amounts = {k: v for part in ("budget", "limits", "elements") for k, v in data.get(part, {}).items()}
    assert {k: v for k, v in amounts.items() if k not in ("allocation", "multiple_of")} == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("budget: {sparsty: 0.5}", "unknown key budget.sparsty; did you mean 'sparsity'?"),
        ("budget: {sparsity: half}", "budget.sparsity half: expected a number"),
        ("- a", "the file: expected keys and values"),
        ("a: [", "not YAML"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_file_is_one_line(text: str | None, says: str, file: Path) -> None:
    if text is not None:
        file.write_text(text, encoding="utf-8")
    refused(file.parent, (f"recipe {file}: ", says), "prune", "--recipe", file)


def test_a_recipe_for_the_main_job_alone() -> None:
    assert "--recipe" in {name for a in dict(commands())["prune"].assemble_argument_collection() for name in a.names}


@pytest.mark.slow
def test_the_recipe_of_a_run_makes_the_same_again(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT * 20, encoding="utf-8")
    small = ["--samples", 2, "--seq-len", 32, "--calibration", tmp_path / "text.txt"]
    done("prune", model, *small, "--keep", 5, "--option", "variant=means", "--out", tmp_path / "one")
    recipe = tmp_path / "one" / "recipe.yaml"
    assert Recipe.load(recipe).budget.keep == 5
    done("prune", model, "--recipe", recipe, "--out", tmp_path / "two")
    for name in ("model.safetensors", "plan.json", "recipe.yaml"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    done("prune", model, "--recipe", recipe, "--sparsity", 0.25, "--out", tmp_path / "three")
    plan = json.loads((tmp_path / "three" / "plan.json").read_text(encoding="utf-8"))
    assert plan["made_by"]["sparsity"] == 0.25
    assert json.loads(plan["made_by"]["options"]) == {"variant": "means"}


def test_a_wrong_flag_beside_a_file_is_the_same_one_line(file: Path) -> None:
    """Reading a file imports pydantic, with which cyclopts would say it otherwise."""
    file.write_text("method: {seed: 1}", encoding="utf-8")
    for words, says in (
        (("--ratio", "a=x"), "sspruner: --ratio a=x: 'x' is not a number\n"),
        (("--state-bytes", "3XB"), "sspruner: --state-bytes '3XB': expected a size such as 25MB, 25MiB or 80GB\n"),
    ):
        assert run("prune", "--recipe", file, *words).stderr == says


@pytest.mark.parametrize("method", ["distil", "gradual", "twist"])
def test_train_takes_a_recipe(method: str, file: Path) -> None:
    file.write_text("text: {text: [a.txt]}\nsettings: {batch: 3, seed: 5}\n", encoding="utf-8")
    words = ["train", method, "model", "--recipe", str(file), "--seed", "7", "--out", "out"]
    _, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    recipe = bound.kwargs["recipe"]
    assert (recipe.text.text, recipe.settings.batch, recipe.settings.seed) == (("a.txt",), 3, 7)


def test_compare_takes_a_recipe(file: Path) -> None:
    file.write_text("cells: {scorers: [random], sparsities: [0.5]}\nmethod: {seed: 5}\n", encoding="utf-8")
    words = ["compare", "model", "--recipe", str(file), "--sparsity", "0.25,0.75"]
    _, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    recipe = bound.kwargs["recipe"]
    assert (recipe.cells.scorers, recipe.cells.sparsities, recipe.method.seed) == (("random",), (0.25, 0.75), 5)
