"""Compare: every cell is what its own score, plan and measurement give, and scores come from the cache."""

from __future__ import annotations

import copy
import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sspruner
from sspruner.comparison.record import Cut, row_from_json, row_to_json
from sspruner.evaluation.damage import damage, damages
from sspruner.evaluation.last_word import Passage, last_words
from sspruner.evaluation.paired import Interval
from sspruner.evaluation.recall import recall, sequences
from sspruner.recipes.parts import Reconstruction
from sspruner.scoring.known import installed_scorers
from sspruner.units import change_text, interval_text
from support.command import run as cli
from support.tensors import same, tensors
from support.tiny import tiny_model, tokens
from support.zoo import zoo

SCORERS = ["ghost", "balanced", "magnitude", "taylor"]


def data_of(model: Any) -> sspruner.Calibration:
    return sspruner.calibration(tokens(7, 24), model, samples=4, held_out=3)


@pytest.mark.slow
def test_every_cell_is_that_of_its_own_steps() -> None:
    model = tiny_model(groups=2, layers=3, state=6)
    before, data = tensors(model), data_of(model)
    found = sspruner.compare(model, SCORERS, sparsities=(0.5, 0.34), calibration=data)
    assert same(tensors(model), before)
    assert list(found.cells) == SCORERS
    graph = sspruner.trace(model)
    for scorer in SCORERS:
        scores = sspruner.score(model, scorer, calibration=data)
        for sparsity in (0.5, 0.34):
            plan = sspruner.plan(graph, scores, sparsity=sparsity)
            alone = damage(model, plan, graph, data.held_out_batches(8))
            cell = found.cells[scorer][sparsity]
            assert isinstance(cell, Cut)
            ratio = alone.pruned_perplexity / alone.dense_perplexity
            assert cell.measures["perplexity"].value == pytest.approx(alone.pruned_perplexity, rel=1e-6)
            assert cell.measures["perplexity_ratio"].value == pytest.approx(ratio, rel=1e-6)
            assert cell.measures["kl_to_dense"].value == pytest.approx(alone.kl, rel=1e-4, abs=1e-9)
            assert found.dense.measures["perplexity"].value == pytest.approx(alone.dense_perplexity, rel=1e-6)
            assert cell.kept == {name: kept.after for name, kept in plan.groups.items()}
            after = sspruner.trace(sspruner.apply(copy.deepcopy(model), plan))
            assert (cell.state_bytes, cell.parameters) == (after.state_bytes, after.parameters)
    assert found.cells["ghost"][0.5] != found.cells["magnitude"][0.5]
    assert (found.dense.state_bytes, found.dense.parameters) == (graph.state_bytes, graph.parameters)


def test_padding_is_not_measured() -> None:
    model = tiny_model(state=6)
    data = data_of(model)
    short = torch.ones_like(data.held_out_mask)
    short[1, 9:] = False
    padded = replace(data, held_out_mask=short)
    plan = sspruner.plan(sspruner.trace(model), sspruner.score(model, "magnitude"), sparsity=0.5)
    alone = damage(model, plan, sspruner.trace(model), padded.held_out_batches(8))
    cut = sspruner.compare(model, ["magnitude"], sparsities=(0.5,), calibration=padded).cells["magnitude"][0.5]
    assert isinstance(cut, Cut)
    assert cut.measures["perplexity"].value == pytest.approx(alone.pruned_perplexity, rel=1e-6)
    assert cut.measures["kl_to_dense"].value == pytest.approx(alone.kl, rel=1e-4)


def test_the_dense_model_beside_itself_is_level_and_intervals_hold_their_values() -> None:
    model = tiny_model(state=6)
    found = sspruner.compare(model, ["random"], sparsities=(0.5,), calibration=data_of(model), metrics=("kl", "recall"))
    dense = found.dense.measures
    assert dense["perplexity_ratio"] == (1, 1, 1)
    assert dense["kl_to_dense"] == (0, 0, 0)
    assert dense["top1_agreement"] == (1, 1, 1)
    assert dense["recall_accuracy_change"] == (0, 0, 0)
    cut = found.cells["random"][0.5]
    assert isinstance(cut, Cut)
    assert set(cut.measures) == set(dense)
    for value, low, high in cut.measures.values():
        assert low <= value <= high
    assert cut.measures["kl_to_dense"].low > 0
    assert cut.measures["recall_nll"] != dense["recall_nll"]


def test_passages_and_recall_are_those_of_the_masked_model() -> None:
    model = tiny_model(state=6)
    passages = [Passage((1, 2, 3), (4,)), Passage((5, 6), (7, 8)), Passage((3, 1, 4, 1, 5), (9,))]
    how: dict[str, Any] = {"sparsities": (0.5,), "calibration": data_of(model)}
    found = sspruner.compare(model, ["magnitude"], metrics=("lambada", "recall"), passages=passages, seed=3, **how)
    cut = found.cells["magnitude"][0.5]
    assert isinstance(cut, Cut)
    assert "perplexity" not in cut.measures
    asked = sequences(128, model.config.vocab_size // 2, model.config.vocab_size, torch.Generator().manual_seed(3))
    plan = sspruner.plan(sspruner.trace(model), sspruner.score(model, "magnitude"), sparsity=0.5)
    dense = float(last_words(model, passages)[0].mean())
    with sspruner.masked(model, plan):
        own, hits = last_words(model, passages)
        right, nll = recall(model, asked)
    assert cut.measures["lambada_nll"].value == pytest.approx(float(own.mean()), rel=1e-9)
    assert cut.measures["lambada_nll_change"].value == pytest.approx(float(own.mean()) - dense, rel=1e-6, abs=1e-9)
    assert cut.measures["lambada_accuracy"].value == pytest.approx(float(hits.double().mean()))
    assert cut.measures["recall_accuracy"].value == pytest.approx(float(right.mean()))
    assert cut.measures["recall_nll"].value == pytest.approx(float(nll.mean()), rel=1e-9)
    for wrong in ({"metrics": ("lambada",)}, {"passages": passages}, {"metrics": ("bleu",)}, {"metrics": ()}):
        with pytest.raises(sspruner.InputError, match="metric"):
            sspruner.compare(model, ["magnitude"], **how, **wrong)
    with pytest.raises(
        sspruner.InputError, match=r"lambada words.jsonl: .*has no tokenizer; give one with --tokenizer"
    ):
        sspruner.compare(model, ["magnitude"], metrics=("lambada",), lambada="words.jsonl", **how)


def test_a_smaller_dense_model_stands_beside_the_cuts_of_its_state() -> None:
    model, small = tiny_model(state=8), tiny_model(state=4, seed=5)
    data = data_of(model)
    found = sspruner.compare(model, ["random"], sparsities=(0.25, 0.5), calibration=data, baseline=small)
    found = found.named("m", "c", "little")
    assert found.baseline is not None
    assert found.baseline.state_bytes == sspruner.trace(small).state_bytes
    alone = sspruner.compare(small, ["random"], sparsities=(0.5,), calibration=data).dense.measures["perplexity"]
    assert found.baseline.measures["perplexity"].value == pytest.approx(alone.value, rel=1e-6)
    assert found.baseline.measures["kl_to_dense"].low > 0  # against the larger one, not itself
    ratio = alone.value / found.dense.measures["perplexity"].value
    assert found.baseline.measures["perplexity_ratio"].value == pytest.approx(ratio, rel=1e-6)
    (_, _, rows), (_, _, divergences) = found.tables()
    assert rows[-1][:2] == divergences[-1][:2] == ["smaller dense: little", ""]
    change = found.baseline.measures["perplexity_ratio"]
    assert rows[-1][2] == change_text(change)
    assert "smaller dense model little" in found.to_markdown()
    small.resize_token_embeddings(small.config.vocab_size + 1)
    with pytest.raises(sspruner.InputError, match="same tokens"):
        sspruner.compare(model, ["random"], calibration=data, baseline=small)


@pytest.mark.slow
def test_finished_rows_are_taken_again_until_something_changes(tmp_path: Path) -> None:
    model = tiny_model(state=6)
    data, out = data_of(model), tmp_path / "out"
    how: dict[str, Any] = {"sparsities": (129 / 256, 0.01), "calibration": data, "out": out}
    runs: list[int] = []
    model.register_forward_hook(lambda *_: runs.append(1))

    def forwards(scorers: list[str], **changed: Any) -> tuple[int, Any]:
        runs.clear()
        found = sspruner.compare(model, scorers, **how | changed)
        return len(runs), found

    class Stop(Exception):
        pass

    def stop(known: Any) -> None:
        if len(known.cells) == 2:
            raise Stop

    with pytest.raises(Stop):
        forwards(["magnitude", "random", "last"], on_row=stop)
    whole, one_go = forwards(["magnitude", "random", "last"], out=None)
    resumed, found = forwards(["magnitude", "random", "last"])
    assert found.cells == one_go.cells
    assert resumed < whole
    again, found = forwards(["magnitude", "random", "last"])
    assert found.cells == one_go.cells
    assert again < resumed
    for file in (out / ".rows").iterdir():
        file.write_text("{")
    assert forwards(["magnitude", "random", "last"])[0] == whole
    assert forwards(["magnitude"], seed=1)[0] > again
    with torch.no_grad():
        model.backbone.layers[0].mixer.D[0] += 1
    assert forwards(["magnitude"])[1].cells["magnitude"] != one_go.cells["magnitude"]
    assert forwards(["ghost"])[0] > forwards(["ghost"])[0]
    changed = replace(data, tokens=data.tokens.flip(0, 1))  # other scores, the same held-out text
    assert forwards(["ghost"], calibration=changed)[0] > forwards(["ghost"], calibration=changed)[0]
    scores = sspruner.Scores.load(out / "scores" / "last.safetensors")
    assert scores.metadata["scorer"] == "last"
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("x")
    with pytest.raises(sspruner.InputError, match="holds other files"):
        sspruner.compare(model, ["random"], calibration=data, out=other)


@given(st.floats(0, 1, exclude_max=True))
def test_a_row_is_found_at_its_fraction_again(sparsity: float) -> None:
    row: dict[float, Cut | str] = {sparsity: "no room", 115 / 128: "none"}
    assert row_from_json(json.loads(json.dumps(row_to_json(row)))) == row


def test_json_markdown_and_csv_say_the_same(tmp_path: Path) -> None:
    model = tiny_model(state=6)
    found = sspruner.compare(model, ["random", "last"], sparsities=(0.5, 0.01), calibration=data_of(model))
    found.named("a|b", "c").save(tmp_path)
    data = json.loads((tmp_path / "compare.json").read_text())
    lines = list(csv.DictReader((tmp_path / "compare.csv").read_text().splitlines()))
    for label, row in found.cells.items():
        cut = row[0.5]
        assert isinstance(cut, Cut)
        assert Cut.from_json(data["cells"][label]["0.5"]) == cut
        assert data["cells"][label]["0.01"] == {"error": row[0.01]}
        own = {line["measure"]: line for line in lines if (line["scorer"], line["sparsity"]) == (label, "0.5")}
        assert {name: tuple(float(own[name][k]) for k in ("value", "low", "high")) for name in own} == cut.measures
        shown = interval_text(cut.measures["kl_to_dense"])
        assert f"| {label} | {shown} | – |" in (tmp_path / "compare.md").read_text()


def test_several_plans_are_measured_as_one_by_one_and_the_dense_model_runs_once() -> None:
    model = tiny_model(state=6)
    graph, data = sspruner.trace(model), data_of(model)
    scores = sspruner.score(model, "random")
    plans = [sspruner.plan(graph, scores, keep=keep) for keep in (1, 3, 5)]
    runs = []
    handle = model.register_forward_hook(lambda *_: runs.append(1))
    together = damages(model, plans, graph, data.held_out_batches(2))
    handle.remove()
    assert len(runs) == 2 * (1 + 3)  # two batches
    assert together == [damage(model, plan, graph, data.held_out_batches(2)) for plan in plans]


def test_scores_come_from_the_cache_until_something_changes() -> None:
    model = tiny_model()
    data = data_of(model)
    how: dict[str, Any] = {"sparsities": (0.5,), "calibration": data, "cache": True}
    first = sspruner.compare(model, ["ghost", "balanced", "magnitude"], **how)
    again = sspruner.compare(model, ["ghost", "balanced", "magnitude"], **how)
    assert (first.from_cache, again.from_cache) == ((), ("ghost", "balanced"))  # weights alone are never kept
    assert again.cells == first.cells
    assert sspruner.prune(copy.deepcopy(model), "ghost", one_shot=True, calibration=data, cache=True).scores.from_cache
    with torch.no_grad():
        model.backbone.layers[0].mixer.in_proj.weight[0, 0] += 1
    assert sspruner.compare(model, ["ghost"], **how).from_cache == ()


def test_a_cut_that_cannot_be_made_is_a_cell_and_all_of_them_an_error() -> None:
    model = zoo("mamba2")
    found = sspruner.compare(model, ["random"], sparsities=(0.5, 0.01), axis="head", calibration=data_of(model))
    assert isinstance(found.cells["random"][0.5], Cut)
    assert "0.01 removes nothing from" in str(found.cells["random"][0.01])
    with pytest.raises(sspruner.InputError, match=r"0\.01 removes nothing from"):
        sspruner.compare(model, ["random"], sparsities=(0.01,), axis="head", calibration=data_of(model))
    with pytest.raises(sspruner.InputError, match=r"sparsity 1\.5: must be at least 0 and below 1"):
        sspruner.compare(model, ["random"], sparsities=(0.5, 1.5), calibration="no such file")
    hybrid = zoo("zamba2")  # a plan that drops every attention layer is another kind of error
    blocks = sspruner.compare(hybrid, ["random"], sparsities=(0.2, 0.8), axis="block", calibration=data_of(hybrid))
    assert any("drops every attention layer" in str(cell) for cell in blocks.cells["random"].values())
    for wrong in ({"sparsities": ()}, {"scorers": []}):
        with pytest.raises(sspruner.InputError, match="at least one scorer and one sparsity"):
            sspruner.compare(model, **{"scorers": ["random"], "calibration": data_of(model), **wrong})


@pytest.mark.slow
def test_the_command_line(tmp_path: Path) -> None:
    source = str(sspruner.save(tiny_model(state=8), tmp_path / "model"))
    args = ["compare", source, "--samples", "4", "--seq-len", "24", "--sparsity", "0.5", "--sparsity", "0.25"]
    done = cli(*args, "--scorer", "ghost", "--scorer", "magnitude", "--json", str(tmp_path / "c.json"))
    assert done.exit_code == 0, done.output
    assert "50 %" in done.output
    assert "one-shot scores" in done.output
    data = json.loads((tmp_path / "c.json").read_text())
    assert set(data["cells"]) == {"ghost", "magnitude"}
    assert set(data["cells"]["ghost"]) == {"0.5", "0.25"}
    assert data["cells"]["ghost"]["0.5"]["perplexity"] > 0
    both = cli(*args[:-4], "--scorers", "ghost,magnitude", "--sparsity", "0.5,0.25", "--json", "-")
    assert json.loads(both.stdout)["cells"] == data["cells"]
    again = cli(*args, "--scorer", "ghost")
    assert "from the cache: ghost" in again.output
    everything = cli(*args, "--json", "-")
    assert everything.exit_code == 0, everything.output
    ran = set(json.loads(everything.stdout)["cells"])
    known = {name for name, (cls, _) in installed_scorers().items() if "state" in cls.axes and cls.needs == "weights"}
    assert ran == known | {"ghost"}
    for more, why in (
        (["--scorer", "ghots"], "unknown scorer 'ghots'"),
        (["--axis", "stat"], "'stat'"),
        (["--sparsity", "2"], "sparsity 2: must be at least 0 and below 1"),
        (["--sparsity", "0.5,x"], "--sparsity: 'x' is not a number"),
        (["--metrics", "ppl,bleu"], "metrics bleu: choose among ppl, kl, lambada, recall"),
        (["--metrics", "lambada"], "name a file with --lambada"),
    ):
        wrong = cli(*args, *more)
        assert wrong.exit_code == 2
        assert why in wrong.output


def test_what_is_no_number_is_null_in_json_and_shown_as_such(tmp_path: Path) -> None:
    model = tiny_model(state=6)
    found = sspruner.compare(model, ["random"], sparsities=(0.5,), calibration=data_of(model))
    cut = found.cells["random"][0.5]
    assert isinstance(cut, Cut)
    nothing = Interval(math.nan, math.nan, math.inf)
    broken = replace(cut, measures=cut.measures | {"perplexity": nothing, "perplexity_ratio": nothing})
    found = replace(found, cells={"random": {0.5: broken}})
    found.save(tmp_path)
    data = json.loads((tmp_path / "compare.json").read_text(), parse_constant=pytest.fail)["cells"]["random"]["0.5"]
    assert (data["perplexity"], data["perplexity_interval"]) == (None, [None, None, None])
    assert math.isnan(Cut.from_json(data).measures["perplexity"].value)
    assert Cut.from_json(data).measures["kl_to_dense"] == cut.measures["kl_to_dense"]
    assert "| nan % |" in found.to_markdown()
    sspruner.report(tmp_path)
    assert (tmp_path / "report.html").is_file()


def test_the_recipe_is_beside_the_tables_and_makes_them_again(tmp_path: Path) -> None:
    model, out = tiny_model(state=6), tmp_path / "out"
    short = {"sparsities": (0.5,), "samples": 3, "seq_len": 12, "seed": 2, "ignore": ["layers.0.*"]}
    found = sspruner.compare(model, ["random", "magnitude"], out=out, **short)
    assert found.recipe == sspruner.CompareRecipe.load(out / "recipe.yaml")
    found.save(tmp_path)
    recipe = sspruner.CompareRecipe.load(tmp_path / "recipe.yaml")
    assert json.loads((tmp_path / "compare.json").read_text())["recipe"] == recipe.to_json()
    again = sspruner.compare(model, recipe)
    assert again.cells == found.cells
    assert all("layers.0." not in name for name in again.cells["random"][0.5].kept)
    other = replace(recipe, method=replace(recipe.method, seed=3))
    assert sspruner.compare(model, other).cells["random"] != found.cells["random"]
    with pytest.raises(sspruner.InputError, match="seed: a recipe says this"):
        sspruner.compare(model, recipe, seed=3)
    with pytest.raises(sspruner.InputError, match="baseline small: load it"):
        sspruner.compare(model, replace(recipe, cells=replace(recipe.cells, baseline="small")))
    with pytest.raises(sspruner.InputError, match=r"unknown argument 'sparsity'; did you mean 'sparsities'\?"):
        sspruner.compare(model, ["random"], sparsity=0.5)


def test_floor_and_cap_bound_every_cut() -> None:
    model = tiny_model(state=6)
    found = sspruner.compare(model, ["random"], sparsities=(0.5, 0.8), calibration=data_of(model), floor=2, cap=3)
    kept = [set(found.cells["random"][sparsity].kept.values()) for sparsity in (0.5, 0.8)]
    assert kept == [{3}, {2}]


def test_without_scorers_those_that_need_weights_and_ghost_are_compared() -> None:
    model = tiny_model(state=6)
    found = sspruner.compare(model, sparsities=(0.5,), calibration=data_of(model))
    quick = {name for name, (cls, _) in installed_scorers().items() if "state" in cls.axes and cls.needs == "weights"}
    assert set(found.cells) == quick | {"ghost"}
    assert found.recipe is not None
    assert found.recipe.cells.scorers == tuple(found.cells)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["output", "reconstruct"])
def test_every_cut_has_the_new_values_of_its_refit(kind: str) -> None:
    """Scores and held-out text are those without one; reconstruct reads more windows of the calibration text."""
    model = tiny_model(state=6)
    data, settings = data_of(model), Reconstruction(refit_steps=8, refit_windows=4)
    how: dict[str, Any] = {"sparsities": (0.5,), "calibration": data}
    plain = sspruner.compare(model, ["magnitude"], **how)
    found = sspruner.compare(model, ["magnitude"], refit=kind, reconstruction=settings, **how)
    plan = sspruner.plan(sspruner.trace(model), sspruner.score(model, "magnitude"), sparsity=0.5)
    better = sspruner.refit(model, plan, kind, calibration=data, settings=settings).plan
    assert better.updates
    alone = damage(model, better, sspruner.trace(model), data.held_out_batches(8))
    cell = found.cells["magnitude"][0.5]
    assert isinstance(cell, Cut)
    assert cell.measures["perplexity"].value == pytest.approx(alone.pruned_perplexity, rel=1e-6)
    assert cell != plain.cells["magnitude"][0.5]
    assert found.dense == plain.dense


def test_a_refit_that_lacks_text_is_the_reason_in_its_cell() -> None:
    model = tiny_model(groups=2, heads_per_group=4, head_dim=8)  # 32 columns
    data = sspruner.calibration(tokens(5, 8), model, samples=3, held_out=2)
    with pytest.raises(sspruner.InputError, match="axis hidden"):
        sspruner.compare(model, ["magnitude"], axis="hidden", refit="reconstruct", calibration=data)
    found = sspruner.compare(model, ["magnitude"], sparsities=(0.5,), refit="reconstruct", calibration=data)
    assert "24 calibration tokens for 32 unknowns" in str(found.cells["magnitude"][0.5])
