"""Result: it prints as a table, saves itself, and comes from a recipe or from short arguments alike."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import pytest
import torch

import sspruner
from sspruner import Recipe, Remove
from sspruner.units import change_text, number_text
from support.tiny import tiny_model, tokens


@pytest.fixture(scope="module")
def result():
    return sspruner.prune(tiny_model(), "magnitude", sparsity=0.5, calibration=tokens(6, 16), seed=3)


def test_a_recipe_and_short_arguments_prune_alike(result):
    recipe = Recipe.of("magnitude", sparsity=0.5, seed=3)
    assert result.recipe == recipe
    again = sspruner.prune(tiny_model(), recipe, calibration=tokens(6, 16))
    assert again.plan == result.plan
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, result.model.state_dict()[name]), name
    assert again.report.recipe == result.report.recipe == recipe.to_json()


def test_a_recipe_beside_short_arguments_is_refused():
    model, before = tiny_model(), copy.deepcopy(tiny_model().state_dict())
    with pytest.raises(sspruner.InputError, match=r"sparsity: a recipe says this; change the recipe"):
        sspruner.prune(model, Recipe(), sparsity=0.25)
    with pytest.raises(sspruner.InputError, match=r"unknown argument 'sparsty'; did you mean 'sparsity'\?"):
        sspruner.prune(model, "magnitude", sparsty=0.25)
    with pytest.raises(sspruner.InputError, match=r"unknown argument 'sample'; did you mean 'samples'\?"):
        sspruner.score(model, "magnitude", sample=3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_print_and_notebooks_show_the_table(result):
    text = str(result)
    report = result.report
    for part in (
        "state size",
        f"{report.dense['parameters']:,}",
        number_text(report.pruned["perplexity"]),
        change_text(report.pruned["perplexity_ratio"]),
        "proof: sliced",
    ):
        assert part in text
    html = result._repr_html_()
    assert html.startswith("<pre")
    assert f"{report.pruned['parameters']:,}" in html


def test_save_writes_what_load_reads_and_the_recipe(result, tmp_path):
    folder = tmp_path / "pruned"
    result.save(folder)
    loaded, _ = sspruner.load(folder)
    ids = tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, result.model(ids).logits)
    assert Recipe.load(folder / "recipe.yaml") == result.recipe
    with pytest.raises(sspruner.InputError, match="exists"):
        result.save(folder)
    result.save(folder, overwrite=True)


def test_a_saved_recipe_makes_the_same_cut_of_another_axis(tmp_path):
    recipe = Recipe.of("magnitude", axis="head", sparsity=0.5)
    recipe.save(tmp_path / "r.yaml")
    loaded = Recipe.load(tmp_path / "r.yaml")
    assert loaded == recipe
    assert replace(loaded, remove=Remove("state")) == Recipe.of("magnitude", sparsity=0.5)
    results = [sspruner.prune(tiny_model(), one, calibration=tokens(4, 16)) for one in (recipe, loaded)]
    assert results[0].plan == results[1].plan
    assert set(results[0].plan.axes) == {"head"}


def test_progress_is_shown_or_called(capsys):
    phases = []
    sspruner.prune(
        tiny_model(), "ghost", calibration=tokens(4, 16), progress=lambda phase, done, total: phases.append(phase)
    )
    assert any(phase.startswith("scoring") for phase in phases)
    sspruner.prune(tiny_model(), "ghost", calibration=tokens(4, 16), progress=True)
    assert not capsys.readouterr().out  # bars are for a terminal, on standard error


def test_old_names_still_work_and_warn(tmp_path):
    with pytest.warns(DeprecationWarning, match=r"sspruner\.evaluate_model is now sspruner\.evaluate"):
        assert sspruner.evaluate_model is sspruner.evaluate
    with pytest.warns(DeprecationWarning, match=r"sspruner\.write_report is now sspruner\.report"):
        assert sspruner.write_report is sspruner.report
    from sspruner.plugins import manager

    with pytest.warns(DeprecationWarning, match=r"sspruner\.scoring\.known\.find_scorer"):
        cls, _ = manager.scorer("ghost")
    assert cls.name == "ghost"
    with warnings.catch_warnings(), pytest.raises(AttributeError):
        _ = sspruner.no_such_name
