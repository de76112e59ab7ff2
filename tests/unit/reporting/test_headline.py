"""The sentences on top of a report: scorer, cut, change with its interval, and proof."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import sspruner
from sspruner.comparison.record import Cut
from sspruner.evaluation.damage import damage
from sspruner.evaluation.paired import Interval
from sspruner.reporting.folder import Folder, read_folder
from sspruner.reporting.headline import headline
from sspruner.reporting.sections import sections
from support.tiny import tiny_model, tokens


def test_a_cut_is_said_with_its_cost_and_its_proof() -> None:
    model = tiny_model(layers=2, state=8)
    result = sspruner.prune(model, "magnitude", sparsity=0.5, calibration=tokens(8, 24)).named("mine", "c")
    ratio = [1.0451, 1.03, 1.06]
    report = replace(result.report, pruned=result.report.pruned | {"perplexity_ratio": ratio, "kl_to_dense": 0.01234})
    (line,) = headline(Folder(report={"report.json": report}))
    assert line.startswith("mine: magnitude cut state 8 → 4. Perplexity +4.5 % (+3.0 to +6.0), KL 0.01234 nats")
    assert "State per sequence 512 B → 256 B (-50.00 %)." in line
    assert f"Proof: sliced = masked to {report.proof.error:.1e}" in line


def test_reports_of_before_have_no_ratio_and_say_the_rest() -> None:
    result = sspruner.prune(tiny_model(state=8), "magnitude", sparsity=0.5, calibration=tokens(8, 24))
    older = {key: value for key, value in result.report.pruned.items() if key != "perplexity_ratio"}
    (line,) = headline(Folder(report={"report.json": replace(result.report, pruned=older)}))
    assert "Perplexity" not in line
    assert "Proof" in line


def test_a_comparison_names_the_scorer_that_costs_least_at_the_deepest_cut() -> None:
    model = tiny_model(state=8)
    found = sspruner.compare(model, ["random", "magnitude"], sparsities=(0.25, 0.5), calibration=tokens(8, 24))

    def costing(cell: Cut | str, value: float) -> Cut:
        assert isinstance(cell, Cut)
        return replace(cell, measures=cell.measures | {"perplexity_ratio": Interval(value, value - 0.1, value + 0.1)})

    costs = {"random": {0.25: 1.5, 0.5: 1.2}, "magnitude": {0.25: 1.1, 0.5: 1.4}}
    cells = {label: {s: costing(row[s], costs[label][s]) for s in row} for label, row in found.cells.items()}
    (line,) = headline(Folder(compare={"compare.json": replace(found, cells=cells)}))
    assert "of 2 scorers random costs least with 50 % of state removed: perplexity +20 % (+10 to +30)" in line


def test_the_interval_is_that_of_the_same_windows() -> None:
    model = tiny_model(state=8)
    graph = sspruner.trace(model)
    plan = sspruner.plan(graph, sspruner.score(model, "random"), keep=2)
    data = sspruner.calibration(tokens(8, 24), model)
    cost = damage(model, plan, graph, data.batches(3))
    assert cost.ratio.value == pytest.approx(cost.pruned_perplexity / cost.dense_perplexity, rel=1e-9)
    assert cost.ratio.low < cost.ratio.value < cost.ratio.high
    again = damage(model, plan, graph, data.batches(5))
    assert again.ratio == pytest.approx(cost.ratio, rel=1e-6)  # however the windows are put into batches


def test_comparisons_of_several_models_are_on_one_page(tmp_path: Path) -> None:
    for name, state in (("wide", 8), ("narrow", 4)):
        found = sspruner.compare(tiny_model(state=state), ["random"], sparsities=(0.5,), calibration=tokens(6, 16))
        (tmp_path / name).mkdir()
        found.named(name, "c").save(tmp_path / name)
    folder = read_folder(tmp_path)
    assert [line.partition(":")[0] for line in headline(folder)] == ["narrow", "wide"]
    shown = sections(folder)
    assert [section.title for section in shown][:2] == ["Damage of cuts: narrow", "Damage of cuts: wide"]
    pictures = [figure.name for section in shown for figure in section.figures]
    assert len(set(pictures)) == len(pictures) == 6


def test_too_few_windows_are_said(tmp_path: Path) -> None:
    """Two windows cannot have a 95 % interval, though a bootstrap of them has some width."""
    how = {"sparsity": 0.5, "samples": 4}
    few = sspruner.prune(tiny_model(state=8), "magnitude", calibration=tokens(6, 24), **how)
    enough = sspruner.prune(tiny_model(state=8), "magnitude", calibration=tokens(20, 24), **how)
    assert ", in 1 window: too few for a 95 % interval" in str(few).replace("\n", " ")
    assert "too few" not in str(enough)
