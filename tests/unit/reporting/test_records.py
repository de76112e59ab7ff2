"""Records as JSON: what is written is read back, and a damaged file is one line, or the record that it says."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sspruner
from sspruner.benchmarking.ceiling import Rates, Work
from sspruner.benchmarking.record import Bench, Timing, timing
from sspruner.comparison.record import Comparison, Cut
from sspruner.evaluation.paired import Interval
from sspruner.evaluation.result import Evaluation, Row
from sspruner.files import strict_json
from sspruner.plans.plan import PlanSummary
from sspruner.pruning.report import Report
from sspruner.reporting.folder import read_folder
from sspruner.reporting.sections import sections
from sspruner.surgery.proof import Proof

FILES = Path(__file__).parents[2] / "saved_by_0_1" / "files"
SAVED: dict[str, tuple[Any, Path]] = {
    "compare.json": (Comparison, FILES / "results" / "compare.json"),
    "bench.json": (Bench, FILES / "results" / "bench.json"),
    "evaluation.json": (Evaluation, FILES / "results" / "evaluation.json"),
    "report.json": (Report, FILES / "balanced" / "report.json"),
}
CONTENT = {name: json.loads(path.read_text(encoding="utf-8")) for name, (_, path) in SAVED.items()}
floats = st.floats(allow_nan=False)  # NaN is not equal to itself
intervals = st.builds(Interval, floats, floats, floats)
names = st.text(max_size=8)
counts = st.integers(0, 2**40)


@given(st.builds(Cut, st.dictionaries(st.sampled_from(["perplexity", "kl_to_dense", "recall_nll"]), intervals), counts,
                 counts, st.dictionaries(names, counts, max_size=3), names))  # fmt: skip
def test_a_cut_comes_back(cut: Cut) -> None:
    cells = {"a": {0.5: cut, 0.75: "cannot"}}
    whole = replace(Comparison.from_json(CONTENT["compare.json"]), dense=cut, cells=cells, sparsities=(0.5, 0.75))
    assert Comparison.from_json(whole.to_json()) == whole
    json.loads(whole.to_json(), parse_constant=pytest.fail)


@given(names, intervals, st.none() | intervals, st.none() | intervals, st.sampled_from(["ratio", "difference"]), counts)
def test_a_row_comes_back(
    metric: str, value: Interval, against: Interval | None, change: Interval | None, kind: str, items: int
) -> None:
    row = Row(metric, value, against, change, kind if change else "difference", items)
    whole = replace(Evaluation.from_json(CONTENT["evaluation.json"]), rows=(row,), by_length={"8": row})
    assert Evaluation.from_json(whole.to_json()) == whole
    json.loads(whole.to_json(), parse_constant=pytest.fail)


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=5), st.none() | counts)
def test_a_timing_comes_back_with_its_repeats(seconds: list[float], peak: int | None) -> None:
    found = timing(seconds, 4, Work(10, 20), Rates(1e9, 1e9), model="m", batch=4, phase="decode", peak_bytes=peak,
                   state_bytes=8, weight_bytes=9, path="here")  # fmt: skip
    assert found.tokens_per_second.low * found.ms.high == pytest.approx(4000)
    whole = replace(Bench.from_json(CONTENT["bench.json"]), rows=(found,))
    again = Bench.from_json(whole.to_json())
    assert again == whole
    assert again.rows[0].speedup(found) == (1, 1, 1)


@given(floats, floats, floats)
def test_a_report_comes_back(perplexity: float, kl: float, error: float) -> None:
    found = Report.load(SAVED["report.json"][1])
    proof = Proof(error, 1e-5, 1, 2, 3, 4)
    found = replace(found, pruned=found.pruned | {"perplexity": perplexity, "kl_to_dense": kl}, proof=proof)
    text = found.to_json()
    assert Report.from_json(text) == found
    json.loads(text, parse_constant=pytest.fail)
    assert replace(found, proof=None) == Report.from_json(replace(found, proof=None).to_json())


def test_what_is_not_finite_is_null_with_its_name() -> None:
    found = Report.load(SAVED["report.json"][1])
    found = replace(found, pruned=found.pruned | {"perplexity": math.inf, "kl_to_dense": math.nan})
    data = json.loads(found.to_json(), parse_constant=pytest.fail)
    assert (data["pruned"]["perplexity"], data["pruned"]["kl_to_dense"]) == (None, None)
    assert data["not_finite"] == {"/pruned/perplexity": "Infinity", "/pruned/kl_to_dense": "NaN"}
    again = Report.from_json(json.dumps(data))
    assert again.pruned["perplexity"] == math.inf
    assert math.isnan(again.pruned["kl_to_dense"])


def places(data: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        yield (*above, key)
        if isinstance(value, dict | list):
            yield from places(value, (*above, key))


PLACES = {name: list(places(data)) for name, data in CONTENT.items()}
JUNK = [None, True, -1, 10**400, 1e308, "x", "", [], [1], [[[]]], {}, {"error": 3}, {"a": 1}]


@settings(max_examples=150)
@given(name=st.sampled_from(sorted(SAVED)), data=st.data())
def test_a_damaged_file_is_one_line_or_is_shown(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One value is junk or missing: an InputError that names the file, or sections that can be made."""
    content = copy.deepcopy(CONTENT[name])
    *above, last = data.draw(st.sampled_from(PLACES[name]))
    inner = content
    for key in above:
        inner = inner[key]
    if data.draw(st.booleans()):
        del inner[last]
    else:
        inner[last] = data.draw(st.sampled_from(JUNK))
    folder = tmp_path_factory.mktemp("damaged")
    (folder / name).write_text(json.dumps(content), encoding="utf-8")
    kind, _ = SAVED[name]
    try:
        kind.load(folder if kind is Comparison else folder / name)
        sections(read_folder(folder))
    except sspruner.InputError as error:
        said = str(error)
    else:
        return
    assert str(folder / name) in said
    assert "\n" not in said


@pytest.mark.parametrize("name", sorted(SAVED))
def test_unknown_keys_are_passed_over_but_in_a_report(name: str) -> None:
    kind, _ = SAVED[name]
    data = CONTENT[name] | {"new": 1}
    if kind is Report:
        with pytest.raises(TypeError, match="new"):
            kind.from_json(data)
    else:
        assert kind.from_json(data) == kind.from_json(CONTENT[name])


def test_a_report_may_lack_what_has_a_default() -> None:
    data = CONTENT["report.json"]
    short = {key: value for key, value in data.items() if key not in ("search", "target", "base_model")}
    assert Report.from_json(short) == Report.from_json(data)
    with pytest.raises(KeyError):
        Report.from_json({key: value for key, value in data.items() if key != "dense"})


def test_one_interval_for_all() -> None:
    assert Interval.from_json([1, 2.5, None])[:2] == (1, 2.5)
    assert Interval.from_json(3) == Interval.exactly(3) == (3, 3, 3)
    for value in ("1", True, [1, 2], [1, 2, "x"], {}, [1, 2, 3, 4]):
        with pytest.raises((TypeError, ValueError)):
            Interval.from_json(value)
    assert isinstance(Timing.from_json(CONTENT["bench.json"]["rows"][0]).ms, Interval)


def test_a_plans_summary_needs_no_tensors() -> None:
    found = PlanSummary.from_json(strict_json.loads((FILES / "balanced" / "plan.json").read_text(encoding="utf-8")))
    assert found.layers == Report.load(FILES / "balanced" / "report.json").layers
    assert found.made_by["scorer"] == "balanced"
