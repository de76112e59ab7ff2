"""Compare: every cell is what its own score, plan and measurement give, and scores come from the cache."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_surgery import same, tensors
from tiny import tiny_model, tokens
from typer.testing import CliRunner
from zoo import zoo

import sspruner
from sspruner.cli.main import app
from sspruner.evaluate.damage import Damage, damage, damages
from sspruner.plugins import manager

SCORERS = ["ghost", "balanced", "magnitude", "taylor"]


def data_of(model: Any) -> sspruner.Calibration:
    return sspruner.calibration(tokens(7, 24), model, samples=4, held_out=3)


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
            assert isinstance(cell, Damage)
            assert cell.pruned_perplexity == pytest.approx(alone.pruned_perplexity, rel=1e-6)
            assert cell.kl == pytest.approx(alone.kl, rel=1e-4, abs=1e-9)
            assert found.dense_perplexity == pytest.approx(alone.dense_perplexity, rel=1e-6)
    assert found.cells["ghost"][0.5] != found.cells["magnitude"][0.5]


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
    assert isinstance(found.cells["random"][0.5], Damage)
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


def test_the_command_line(tmp_path: Path) -> None:
    source = str(sspruner.save(tiny_model(state=8), tmp_path / "model"))
    args = ["compare", source, "--samples", "4", "--seq-len", "24", "--sparsity", "0.5", "--sparsity", "0.25"]
    done = CliRunner().invoke(
        app, [*args, "--scorer", "ghost", "--scorer", "magnitude", "--json", str(tmp_path / "c.json")]
    )
    assert done.exit_code == 0, done.output
    assert "50 %" in done.output
    assert "one-shot scores" in done.output
    data = json.loads((tmp_path / "c.json").read_text())
    assert set(data["cells"]) == {"ghost", "magnitude"}
    assert set(data["cells"]["ghost"]) == {"0.5", "0.25"}
    assert data["cells"]["ghost"]["0.5"]["perplexity"] > 0
    again = CliRunner().invoke(app, [*args, "--scorer", "ghost"])
    assert "from the cache: ghost" in again.output
    everything = CliRunner().invoke(app, [*args, "--json", "-"])
    assert everything.exit_code == 0, everything.output
    ran = set(json.loads(everything.stdout)["cells"])
    known = {name for name, (cls, _) in manager.scorers().items() if "state" in cls.axes and cls.needs == "weights"}
    assert ran == known | {"ghost"}
    for more, why in (
        (["--scorer", "ghots"], "unknown scorer 'ghots'"),
        (["--axis", "stat"], "'stat'"),
        (["--sparsity", "2"], "sparsity 2: must be at least 0 and below 1"),
    ):
        wrong = CliRunner().invoke(app, [*args, *more])
        assert wrong.exit_code == 2
        assert why in wrong.output
