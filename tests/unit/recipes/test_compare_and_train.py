"""Recipes of compare and of the training methods: YAML and back, short forms, texts, and what makes no sense."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sspruner.cli.main import app
from sspruner.errors import InputError
from sspruner.recipes.compare import Cells, CompareRecipe
from sspruner.recipes.measure import BenchOptions, EvaluateOptions, Gates
from sspruner.recipes.parts import Allocation, Remove
from sspruner.recipes.train import (
    Distillation,
    DistilRecipe,
    GradualRecipe,
    Settings,
    TrainText,
    TwistRecipe,
)
from sspruner.recipes.yaml import from_data

FULL: list[Any] = [
    CompareRecipe.of(
        ["ghost", "random"], sparsities=(0.1, 0.9), metrics=("lambada", "recall"), lambada="l.jsonl", baseline="small",
        axis="head", ignore=["layers.0.*"], allocation="global", normalise="last", multiple_of=2, ratios={"a": 0.3},
        floor=2, cap={"b": 9}, options={"ghost.variant": "joint"}, seed=3, source="text.txt", samples=5, seq_len=7,
    ),
    DistilRecipe.of(
        teacher="big", alpha=0.9, temperature=2.0, hidden=0.5, lora=4, text=("a", "b"), held_out=3, max_tokens=99,
        max_minutes=1.5, batch=6, at_once=3, seq_len=8, learning_rate=0.01, warm_up=0.5, weight_decay=0.2, clip=3.0,
        bf16=True, recompute=True, every=7, seed=11, log_with=("tensorboard", "wandb"),
    ),
    GradualRecipe.of(
        axis="state", sparsity=0.3, alpha=0.5, mask_every=3, begin=0.2, end=0.9, allocation="global", teacher="big",
        text="a.txt", every=2,
    ),
    TwistRecipe.of(axis="head,state", keep=0.25, deal_every=4, ends=1, draws=3, text=["a.txt"], seed=5),
]  # fmt: skip

WORDS = [["compare"], ["train", "distil", "m"], ["train", "gradual", "m"], ["train", "twist", "m"]]


@pytest.mark.parametrize("recipe", [*FULL, CompareRecipe(), DistilRecipe(), GradualRecipe(), TwistRecipe()])
def test_yaml_gives_the_recipe_back(recipe: Any, tmp_path: Path) -> None:
    recipe.save(tmp_path / "recipe.yaml")
    assert type(recipe).load(tmp_path / "recipe.yaml") == recipe
    assert from_data(type(recipe), recipe.to_json()) == recipe


@pytest.mark.parametrize(("words", "recipe"), [*zip(WORDS, FULL, strict=True)])
def test_every_value_of_a_file_is_an_option(words: list[str], recipe: Any, tmp_path: Path) -> None:
    recipe.save(tmp_path / "recipe.yaml")

    def parsed(*more: str) -> Any:
        given = [*words, "--recipe", str(tmp_path / "recipe.yaml"), *more]
        return app.parse_args(given, exit_on_error=False, print_error=False)[1].kwargs["recipe"]

    assert parsed() == recipe
    changed = parsed("--seed", "99")
    part = "method" if isinstance(recipe, CompareRecipe) else "settings"
    assert getattr(changed, part).seed == 99
    assert replace(changed, **{part: replace(getattr(changed, part), seed=getattr(recipe, part).seed)}) == recipe


def test_short_arguments_go_to_their_parts() -> None:
    recipe = CompareRecipe.of("ghost,last", sparsities="0.25,0.5", axis="head", calibration="a.txt", seed=4)
    assert recipe.cells == Cells(("ghost", "last"), (0.25, 0.5))
    assert (recipe.remove, recipe.budget) == (Remove("head"), Allocation())
    assert (recipe.calibration.source, recipe.method.seed) == ("a.txt", 4)
    settings = Settings(batch=3)
    assert GradualRecipe.of(settings=settings, alpha=2.0).settings is settings
    assert DistilRecipe.of(batch=3, alpha=None).settings == settings
    assert DistilRecipe.of(method=Distillation(lora=2)).method.lora == 2
    with pytest.raises(InputError, match="batch: is a field of settings, which is given as a whole"):
        DistilRecipe.of(settings=settings, batch=3)
    with pytest.raises(InputError, match=r"unknown argument 'temprature'; did you mean 'temperature'\?"):
        DistilRecipe.of(temprature=2.0)


@given(st.lists(st.floats(0, 1).map(lambda x: round(x, 6)), min_size=1, unique=True))
def test_fractions_as_texts_are_those_numbers(fractions: list[float]) -> None:
    together, apart = ",".join(map(repr, fractions)), [repr(fraction) for fraction in fractions]
    for texts in (together, apart, [together, *apart], fractions):
        assert Cells(sparsities=texts).sparsities == tuple(fractions)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "data", "says"),
    [
        (CompareRecipe, "cells: {scorer: ghost}", "unknown key cells.scorer; did you mean 'scorers'?"),
        (CompareRecipe, "remove: {axis: {state: 0.5}}", "compare: one axis"),
        (CompareRecipe, "cells: {sparsities: [a]}", "cells.sparsities: 'a' is not a number"),
        (CompareRecipe, "budget: {multiple_of: x}", "budget.multiple_of x: expected a whole number"),
        (TwistRecipe, "method: {draws: 0}", "every 15, draws 0: must be at least 1"),
        (TwistRecipe, "method: {keep: 0}", "keep 0.0: must be above 0 and below 1"),
        (TwistRecipe, "method: {keep: 1}", "keep 1.0: must be above 0 and below 1"),
        (TwistRecipe, "method: {ends: -1}", "ends -1: must be at least 0"),
        (GradualRecipe, "method: {sparsity: 1}", "sparsity 1.0: must be above 0 and below 1"),
        (GradualRecipe, "method: {begin: 0.7}", "schedule: begins at 0.7, ends at 0.7, every 10 steps: expected"),
        (GradualRecipe, "method: {mask_every: 0}", "every 0 steps: expected"),
        (DistilRecipe, "method: {alpha: 2}", "alpha 2.0 (0 to 1)"),
        (GradualRecipe, "method: {alpha: -1}", "alpha -1.0: must be at least 0"),
        (DistilRecipe, "settings: {every: 0}", "every 0: must be at least 1"),
        (DistilRecipe, "settings: {clip: 0}", "clip 0.0: must be above 0"),
        (DistilRecipe, "settings: {bf16: 3}", "settings.bf16 3: expected true or false"),
        (DistilRecipe, "text: {heldout: 3}", "unknown key text.heldout; did you mean 'held_out'?"),
    ],
)
def test_a_bad_file_is_named_with_the_key(kind: Any, data: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(data, encoding="utf-8")
    with pytest.raises(InputError) as error:
        kind.load(tmp_path / "r.yaml")
    assert str(error.value).startswith(f"recipe {tmp_path / 'r.yaml'}: ")
    assert says in str(error.value)


def test_one_text_is_a_tuple_of_one() -> None:
    assert TrainText("a.txt").text == ("a.txt",)  # type: ignore[arg-type]
    assert TwistRecipe.of(axis="head").method.axis == ("head",)
    assert TwistRecipe.of(axis=["head", "state"]).method.axis == ("head", "state")


def test_options_of_evaluate_and_bench_read_texts() -> None:
    options = EvaluateOptions.of(metrics="none", tasks="a,b", max_length=9)
    assert (options.measures.metrics, options.measures.tasks) == ((), ("a", "b"))
    assert (options.windows.step, EvaluateOptions.of(stride=3).windows.step) == (4, 3)
    assert Gates(max_ppl_increase="2%").max_ppl_increase == pytest.approx(0.02)  # type: ignore[arg-type]
    bench = BenchOptions.of(batches="4,1,4", bandwidth="1GB/s", flops="2TFLOP/s")
    assert (bench.load.batches, bench.ceiling.bandwidth, bench.ceiling.flops) == ((4, 1), 1e9, 2e12)
    for wrong in ("0", "1,x"):
        with pytest.raises(InputError, match=r"--batch .*whole numbers of at least 1"):
            BenchOptions.of(batches=wrong)
    for unfit in ({"batches": ()}, {"batches": ""}, {"repeats": 0}, {"generate": 0}):
        with pytest.raises(InputError, match="at least"):
            BenchOptions.of(**unfit)
