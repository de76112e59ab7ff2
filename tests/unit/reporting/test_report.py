"""`sspruner report`: whatever lies in a folder, the page shows those numbers, is whole, and loads nothing."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

import sspruner
from sspruner.reporting import html as pages
from sspruner.reporting.agreement import agreement, displaced, is_static, telling
from sspruner.reporting.content import Section, Table
from sspruner.reporting.folder import clean, read_folder
from sspruner.reporting.score_sections import below_best
from sspruner.reporting.sections import sections
from sspruner.scoring.scores import Scores
from sspruner.units import as_bytes
from support.command import done, refused, tree
from support.examples import examples
from support.reports import BENCH, EVALUATION, HOSTILE, bench_row, evaluated, write
from support.tiny import tiny_model, tokens

VOID = {"meta", "link", "br", "hr", "img", "input"}

values = st.floats(1e-6, 1e6) | st.just(float("inf"))
names = st.text(min_size=1, max_size=12) | st.sampled_from([HOSTILE, "_a", "ghost", "\ud800", "a\nb", "$"])
cuts = st.lists(st.sampled_from([0.25, 0.5, 0.75, 0.9, 0.97]), min_size=1, max_size=3, unique=True)


@st.composite
def intervals(draw: Any) -> list[float]:
    middle, part = draw(values), draw(st.floats(0, 0.5))
    return [middle, middle * (1 - part), middle * (1 + part)]


CALIBRATION = {"source": "text", "tokens": 9, "held_out_tokens": 8, "held_out_is_separate": True}


def cut(state_bytes: Any = 8, **measures: Any) -> dict[str, Any]:
    """A cell of compare.json."""
    return measures | {"state_bytes": state_bytes, "parameters": 1000, "kept": {}}


@st.composite
def compares(draw: Any) -> dict[str, Any]:
    """A compare.json; a cell may be an error, and metrics are there for all or for none."""
    sparsities = sorted(draw(cuts))
    metrics = ["perplexity", "perplexity_ratio", *draw(st.sets(st.sampled_from(["kl_to_dense", "recall_accuracy"])))]

    def cell(kept: float) -> dict[str, Any]:
        return cut(round(1e6 * kept), **{metric: draw(intervals()) for metric in metrics})

    labels = draw(st.lists(names, min_size=1, max_size=3, unique_by=clean))
    return {
        "version": 1,
        "model": draw(names),
        "axis": "state",
        "sparsities": sparsities,
        "dense": cut(10**6, perplexity=draw(st.floats(1, 1e4))),
        "cells": {
            label: {
                f"{s:g}": {"error": draw(names)} if draw(st.integers(0, 5)) == 0 else cell(1 - s) for s in sparsities
            }
            for label in labels
        },
        "baseline": cell(0.5) if draw(st.booleans()) else None,
        "calibration": CALIBRATION | {"source": draw(names)},
        "from_cache": [],
        "seed": 3,
        "versions": {"torch": "2"},
        "command": draw(names),
    }


@st.composite
def benches(draw: Any) -> dict[str, Any]:
    models = draw(st.lists(names, min_size=1, max_size=2, unique_by=clean))
    kept = {model: draw(st.sampled_from([1.0, 0.5, 0.25])) for model in models}
    batches = sorted(draw(st.sets(st.sampled_from([1, 16, 64]), min_size=1)))
    rows = [
        {
            "model": model, "batch": batch, "phase": phase, "tokens_per_second": draw(intervals()),
            "ms": draw(intervals()), "ceiling_tokens_per_second": draw(st.none() | st.floats(1, 1e6)),
            "fraction": 0.5, "peak_bytes": draw(st.none() | st.integers(0, 10**10)),
            "state_bytes": round(1e6 * kept[model]), "weight_bytes": 5, "bytes_moved": 6, "operations": 7,
            "path": "here",
        }
        for model in models for phase in ("decode", "prefill") for batch in batches
    ]  # fmt: skip
    return BENCH | {"machine": {"device": draw(names)}, "rows": rows}


@st.composite
def scores(draw: Any) -> Scores:
    """Scores of two layers, with ties; of weights alone or of text; some are a spectrum, some are of directions."""
    seed = draw(st.integers(0, 99))
    made = torch.Generator().manual_seed(seed)
    importance = {f"layers.{i}:state": torch.randint(-2, 9, (2, 8), generator=made).float() for i in range(2)}
    metadata = {"scorer": "s", "model": "m", "calibration": draw(st.sampled_from(["", "text"])), "seed": "0"}
    if draw(st.booleans()):
        metadata["spectrum"] = "Values of interest"
    eye = torch.eye(8).expand(2, 8, 8).contiguous()
    bases = {name: (eye.clone(), eye.clone()) for name in importance} if draw(st.booleans()) else {}
    return Scores(importance, metadata, bases=bases)


@st.composite
def folders(draw: Any) -> dict[str, Any]:
    """What may lie in a folder: at least one kind."""
    kinds = draw(st.sets(st.sampled_from(["compare", "bench", "scores"]), min_size=1))
    found: dict[str, Any] = {}
    if "compare" in kinds:
        found["compare.json"] = draw(compares())
    if "bench" in kinds:
        found["bench.json"] = draw(benches())
    if "scores" in kinds:
        for number in range(draw(st.integers(1, 3))):
            found[f"scores/s{number}.safetensors"] = draw(scores())
    return found


def numbers(text: str) -> list[float]:
    return [float(found.replace(",", "")) for found in re.findall(r"-?(?:inf|\d[\d,]*\.?\d*(?:e[+-]\d+)?)", text)]


def same(text: str, interval: list[float]) -> bool:
    """Whether a text shows a value, or a value and its interval, each rounded to the digits that are shown."""
    found = numbers(text)
    wanted = interval[:1] if len(found) == 1 else interval
    parts = re.findall(r"(\d[\d,]*)\.?(\d*)(e-\d+)?|inf", text)
    last = [0.501 * 10.0 ** -len(places) * float(f"1{power}") for _, places, power in parts]  # half of the last digit
    return all(a == b or abs(a - b) <= digit for a, b, digit in zip(found, wanted, last, strict=True))


def figures(shown: list[Section]) -> set[str]:
    return {figure.name for section in shown for figure in section.figures}


def table(shown: list[Section], section: str, title: str) -> Table:
    (found,) = [t for s in shown if s.title == section for t in s.tables if t.title == title]
    return found


@examples(40)
@given(content=folders())
def test_figures_are_there_if_their_data_are_and_tables_hold_every_number(
    content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    shown = sections(read_folder(write(tmp_path_factory.mktemp("r") / "d", content)))
    compare, bench = content.get("compare.json"), content.get("bench.json")
    scored = [data for name, data in content.items() if name.startswith("scores/")]
    measured = {
        (label, s): cell
        for label, row in (compare["cells"] if compare else {}).items()
        for s, cell in row.items()
        if "error" not in cell
    }
    kl = any("kl_to_dense" in cell for cell in measured.values())
    sized = [cell["state_bytes"] for cell in measured.values()]
    timed = [row["state_bytes"] for row in bench["rows"] if row["phase"] == "decode"] if bench else []
    batches = {row["batch"] for row in bench["rows"]} if bench else set()
    wanted = {
        "compare-perplexity-ratio": bool(measured),
        "compare-kl-to-dense": kl,
        "compare-pareto-bytes": bool(sized),
        "compare-pareto-speed": bool(set(sized) & set(timed)),
        "bench-0": len(batches) > 1,
        "bench-1": len(batches) > 1,
        "agreement": any(not a.bases and not b.bases for a, b in combinations(scored, 2)),
        **{f"scores{i}-state": True for i in range(len(scored))},
        **{f"spectrum{i}-state": "spectrum" in s.metadata for i, s in enumerate(scored)},
    }
    assert figures(shown) == {name for name, there in wanted.items() if there}
    if compare:
        found = table(shown, "Damage of cuts", "All numbers")
        rows = {(row[0], row[1]): dict(zip(found.head, row, strict=False)) for row in found.rows}
        for label, row in compare["cells"].items():
            for s, cell in row.items():
                said = rows[clean(label), f"{100 * float(s):g} %"]
                if "error" in cell:
                    assert said["state"] == clean(cell["error"])
                    continue
                for metric in set(cell) - {"state_bytes", "parameters", "kept"}:
                    assert same(said[metric.replace("_", " ")], cell[metric]), (metric, said)
                assert said["state"] == as_bytes(cell["state_bytes"])
                assert numbers(said["parameters"]) == [cell["parameters"]]
        assert (("smaller dense", "0 %") in rows) == (compare["baseline"] is not None)
    if bench:
        found = table(shown, "Speed in transformers", "All numbers")
        assert len(found.rows) == len(bench["rows"])
        for said, row in zip((dict(zip(found.head, r, strict=True)) for r in found.rows), bench["rows"], strict=True):
            assert (said["model"], said["phase"], said["batch"]) == (
                clean(row["model"]),
                row["phase"],
                str(row["batch"]),
            )
            assert same(said["tokens per second"], row["tokens_per_second"])
            assert same(said["ms"], row["ms"])
            ceiling = row["ceiling_tokens_per_second"]
            assert said["ceiling"] == "–" if ceiling is None else same(said["ceiling"], [ceiling])
    files = {row[0] for row in table(shown, "Where this comes from", "").rows}
    assert files == set(content)


class Page(HTMLParser):
    """A page as a parser sees it: every element closed, and what its cells say."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells[-1] += data


def loads(page: Page) -> Iterator[str]:
    """What a browser would fetch."""
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            local = value is not None and value.startswith(("#", "data:"))
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster") and not local:
                yield f"{tag} {name}={value}"
            if "url(" in (value or "") and "url(#" not in (value or ""):
                yield f"{tag} {name}={value}"


WHOLE = {
    "compare.json": {
        "version": 1, "model": HOSTILE, "axis": "state", "sparsities": [0.5], "dense": cut(perplexity=10.0),
        "cells": {
            HOSTILE: {"0.5": cut(perplexity=[11.0, 10.5, 11.5], perplexity_ratio=[1.1, 1.05, 1.15])},
            "_b": {"0.5": {"error": HOSTILE}},
        },
        "baseline": None, "from_cache": [], "calibration": CALIBRATION, "seed": 0, "versions": {}, "command": "",
    },
}  # fmt: skip


@pytest.mark.slow
@examples(4)
@given(content=folders())
@example(content=WHOLE)
def test_the_page_is_whole_and_loads_nothing(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = write(tmp_path_factory.mktemp("r") / "d", content)
    shown = sections(read_folder(folder))
    out = sspruner.report(folder)
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    assert list(loads(page)) == []
    tags = [tag for tag, _ in page.tags]
    assert not {"img", "iframe", "object"} & set(tags)
    assert [a for t, a in page.tags if t == "script"] == [{}]  # one, in the page itself: the buttons to copy
    assert tags.count("figure") == tags.count("svg") == tags.count("figcaption") == len(figures(shown))
    assert sum(a.get("role") == "img" and len(a["aria-label"]) > 40 for _, a in page.tags) == len(figures(shown))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["xlink:href"][1:] for t, a in page.tags if t == "use"} <= set(ids)
    cells = {cell for s in shown for t in (*s.tables, *(f.table for f in s.figures)) for row in t.rows for cell in row}
    assert cells == set(page.cells)
    pictures = {path.stem: path.read_bytes() for path in (folder / "report-figures").glob("*")}
    assert set(pictures) == figures(shown)
    for name, picture in pictures.items():
        image = Image.open(io.BytesIO(picture))
        image.load()
        assert (image.format, min(image.size) > 200) == ("PNG", True), name
        assert len(image.convert("L").getcolors()) > 10, f"{name} is blank"


def kept(scores: list[float], sparsity: float) -> set[int]:
    count = max(1, round(len(scores) * (1 - sparsity)))
    return set(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


@given(
    a=st.lists(st.integers(0, 6), min_size=1, max_size=12),
    b=st.randoms(use_true_random=False),
    sparsity=st.sampled_from([0.1, 0.25, 0.5, 0.9]),
)
def test_displaced_units_are_those_of_one_set_that_the_other_lacks(a: list[int], b: Any, sparsity: float) -> None:
    other = [b.randint(0, 6) for _ in a]
    gone, stay = displaced(torch.tensor([a, a]).float(), torch.tensor([other, a]).float(), sparsity)
    mine = kept(a, sparsity)
    assert (gone, stay) == (len(mine - kept(other, sparsity)), 2 * len(mine))


def test_agreement_pairs_what_can_be_compared() -> None:
    def made(rank: list[float], **metadata: str) -> Scores:
        return Scores({"l:state": torch.tensor([rank])}, {"model": "m", "calibration": "", **metadata})

    rising, falling = [1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]
    basis = {"l:state": (torch.eye(4)[None], torch.eye(4)[None])}
    scored = {
        "static": made(rising),
        "run": made(falling, calibration="text"),
        "run too": made(rising, calibration="text"),
        "other model": made(rising, model="n"),
        "directions": Scores(made(rising).importance, made(rising).metadata, bases=basis),
    }
    found = agreement(scored, (0.5, 0.75))
    assert found == {("static", "run"): [1, 1], ("static", "run too"): [0, 0], ("run", "run too"): [1, 1]}
    assert telling(found, scored) == [("static", "run"), ("static", "run too")]
    assert telling({("run", "run too"): [1.0]}, scored) == [("run", "run too")]
    assert is_static(scored["static"])


@given(st.lists(st.floats(-10, 1e6), min_size=1, max_size=9))
def test_a_row_is_at_most_three_decades_below_its_best(row: list[float]) -> None:
    found = below_best(torch.tensor(row, dtype=torch.float64))
    assert all(-3 <= value <= 0 for value in found)
    best = max(row)
    for value, score in zip(found, row, strict=True):
        if best > 0 and score >= best / 1000:
            assert 10**value == pytest.approx(score / best, rel=1e-6, abs=1e-9)
        else:
            assert value == pytest.approx(-3)


def test_a_scorer_says_that_its_importance_is_a_spectrum(tmp_path: Path) -> None:
    class Values(sspruner.Scorer):
        name, axes, needs, spectrum = "values", {"state"}, "weights", "Eigenvalues"

        def observe(self, view: sspruner.SSMView) -> None:
            self.shape = view.group.groups, view.group.units

        def importance(self) -> torch.Tensor:
            return torch.arange(self.shape[1]).flip(0).expand(self.shape).float()

    class Plain(Values):
        name, spectrum = "plain", ""

    found = sspruner.score(tiny_model(), [Values, Plain, "balanced"], calibration=tokens(4, 16))
    (tmp_path / "scores").mkdir()
    for label, scored in found.items():
        scored.save(tmp_path / "scores" / f"{label}.safetensors")
    titles = [f.title for s in sections(read_folder(tmp_path)) for f in s.figures if f.name.startswith("spectrum")]
    assert titles == [
        "Hankel singular values of each layer, by balanced",
        "Eigenvalues of each layer, by values",
    ]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `save` wrote, without the weights."""
    model, folder = tiny_model(), tmp_path_factory.mktemp("pruned") / "model"
    result = sspruner.prune(model, "ghost", sparsity=0.5, calibration=tokens(6, 16))
    sspruner.save(model, folder, result=result.named(HOSTILE, "prune it"))
    return folder


@pytest.mark.slow
def test_a_pruned_models_folder_shows_its_cut_and_scores(pruned: Path, tmp_path: Path) -> None:
    result = done("report", pruned, "--out", tmp_path / "page.html")
    assert result.stdout == f"written to {tmp_path / 'page.html'}\n"
    shown = sections(read_folder(pruned))
    report = json.loads((pruned / "report.json").read_text())
    (cut,) = [section for section in shown if section.title == "What was cut"]
    assert {row[0]: (int(row[1]), int(row[2])) for row in cut.figures[0].table.rows} == {
        name: (size["before"], size["after"]) for name, size in report["layers"].items()
    }
    costs = {row[0]: row[1:] for row in cut.tables[0].rows}
    assert same(costs["perplexity"][1], [report["pruned"]["perplexity"]])
    assert same(costs["perplexity"][0], [report["dense"]["perplexity"]])
    assert numbers(costs["state bytes"][1]) == [report["pruned"]["state_bytes"]]
    assert costs["kl to dense"][0] == "–"
    assert figures(shown) == {"kept-0", "scores0-state"}
    cells = Page((tmp_path / "page.html").read_text(encoding="utf-8")).cells
    assert "prune it" in cells
    assert set(tree(tmp_path)) == {
        "page.html", "page-figures", "page-figures/kept-0.png", "page-figures/scores0-state.png"
    }  # fmt: skip


def test_a_plan_alone_and_files_one_folder_down_are_found(pruned: Path, tmp_path: Path) -> None:
    (tmp_path / "below" / "deeper").mkdir(parents=True)
    shutil.copy(pruned / "plan.json", tmp_path / "below")
    shutil.copy(pruned / "report.json", tmp_path / "below" / "deeper")
    found = read_folder(tmp_path)
    assert (list(found.report), list(found.plan)) == ([], ["below/plan.json"])
    whole = read_folder(pruned)
    assert (list(whole.report), list(whole.plan)) == (["report.json"], [])
    assert found.plan["below/plan.json"].layers == whole.report["report.json"].layers


def test_an_evaluation_is_a_table_with_intervals(tmp_path: Path) -> None:
    (tmp_path / "any name.json").write_text(json.dumps(EVALUATION))
    (section, provenance) = sections(read_folder(tmp_path))
    assert (section.title, provenance.title) == ("Quality", "Where this comes from")
    assert section.tables[0].head == ("metric", "value", "b", "change", "items")
    assert section.tables[0].rows == (
        ("perplexity", "12.50 (12.00 to 13.00)", "10.0 (9.0 to 11.0)", "ratio 1.250 (1.200 to 1.300)", "7"),
        ("accuracy", "0.50 (0.25 to 0.75)", "0.75 (0.50 to 1.00)", "difference -0.25 (-0.50 to 0.00)", "9"),
        ("alone", "3", "–", "–", "12,000"),
    )
    assert section.tables[1].head == ("", "value", "against", "items")
    assert section.tables[1].rows == (
        ("128", "20.0 (19.0 to 21.0)", "–", "7"),
        ("256", "18.0 (17.0 to 19.0)", "16", "7"),
        ("8k", "–", "–", "7"),
    )


FILES = {"compare": WHOLE["compare.json"], "bench": BENCH, "evaluation": EVALUATION}


def broken() -> Iterator[Any]:
    for kind, data in FILES.items():
        for key in ("version", "rows" if "rows" in data else "cells"):
            yield pytest.param(f"{kind}.json", {k: v for k, v in data.items() if k != key}, id=f"{kind} without {key}")
        yield pytest.param(f"{kind}.json", data | {"version": 2}, id=f"{kind} of version 2")
        yield pytest.param(f"{kind}.json", [data], id=f"{kind} in a list")
    for key, value in {"batch": "one", "tokens_per_second": [1, 2], "ms": [None] * 2, "state_bytes": []}.items():
        yield pytest.param("my times.json", BENCH | {"rows": [bench_row(**{key: value})]}, id=f"bench {key}={value}")
    for value in ([1, 2], "12", True, {"a": 1}):
        rows = [evaluated("m", value)]
        yield pytest.param("evaluation.json", EVALUATION | {"rows": rows}, id=f"evaluation value={value}")
    for cell in (3, cut(perplexity=[1]), cut(perplexity=[1, 2, "x"]), cut("8", perplexity=1), {"perplexity": 1}):
        yield pytest.param("compare.json", WHOLE["compare.json"] | {"cells": {"a": {"0.5": cell}}}, id=f"cell {cell}")
    yield pytest.param("compare.json", WHOLE["compare.json"] | {"dense": {"perplexity": 0}}, id="dense without sizes")
    yield pytest.param("plan.json", {"version": 1, "groups": {"a:state": {"before": 1}}, "made_by": {}}, id="plan")
    yield pytest.param("report.json", {"version": 1, "layers": {}, "dense": {}}, id="report")


@pytest.mark.parametrize(("name", "data"), list(broken()))
def test_a_damaged_file_is_one_line(name: str, data: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps(data))
    refused(tmp_path, (str(tmp_path / name), "make it again"), "report", tmp_path)


@pytest.mark.parametrize("text", ["", "{", '{"version": 1, "rows": [', "\0", "[" * 100_000])
def test_what_is_no_json_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "some.json").write_text(text)
    refused(tmp_path, ("some.json", "cannot be read as JSON"), "report", tmp_path)


def test_damaged_scores_are_one_line_and_weights_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text(json.dumps(BENCH))
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    assert list(read_folder(tmp_path).bench) == ["bench.json"]
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "a.safetensors").write_bytes(b"not scores")
    refused(tmp_path, ("a.safetensors", "score again"), "report", tmp_path)


def test_a_folder_without_results_is_one_line(tmp_path: Path) -> None:
    refused(tmp_path, (str(tmp_path), "holds nothing to show"), "report", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mamba2"}')
    refused(tmp_path, (str(tmp_path), "holds nothing to show"), "report", tmp_path)
    refused(tmp_path, ("no such folder",), "report", tmp_path / "absent")
    refused(tmp_path, ("no such folder",), "report", tmp_path / "config.json")


@pytest.mark.parametrize("missing", [("jinja2",), ("matplotlib",), ("jinja2", "matplotlib")])
def test_a_missing_library_is_one_line(
    missing: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bench.json").write_text(json.dumps(BENCH))
    monkeypatch.setattr(pages, "find_spec", lambda name: None if name in missing else object())
    refused(tmp_path, ("in a clone of sspruner, pip install '.[report]'", *missing), "report", tmp_path)


@pytest.mark.slow
def test_outputs_are_replaced_whole_or_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bench.json").write_text(json.dumps(BENCH))
    (tmp_path / "compare.json").write_text(json.dumps(WHOLE["compare.json"]))
    figures, page = tmp_path / "report-figures", tmp_path / "report.html"
    sspruner.report(tmp_path)
    assert {path.name for path in figures.iterdir()} == {
        "bench-0.png", "compare-perplexity-ratio.png", "compare-pareto-bytes.png"
    }  # fmt: skip
    (tmp_path / "compare.json").unlink()
    before = tree(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(pages.os, "rename", lambda a, b: (_ for _ in ()).throw(OSError("full")))
        refused(tmp_path, ("cannot be written", "full"), "report", tmp_path)
    sspruner.report(tmp_path)
    assert {path.name for path in figures.iterdir()} == {"bench-0.png"}
    assert page.read_bytes() != before["report.html"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    (figures / "mine.txt").write_text("mine")
    refused(tmp_path, ("report-figures", "not a folder of PNG files"), "report", tmp_path)
    refused(tmp_path, ("no folder",), "report", tmp_path, "--out", tmp_path / "no" / "page.html")


@pytest.mark.slow
def test_the_same_folder_gives_the_same_page(tmp_path: Path) -> None:
    write(tmp_path / "d", {"bench.json": BENCH})
    pages_ = {sspruner.report(tmp_path / "d", tmp_path / f"{i}.html").read_bytes() for i in range(2)}
    assert len(pages_) == 1


@pytest.mark.slow
def test_what_compare_bench_and_evaluate_write_is_shown(tmp_path: Path) -> None:
    """Not made-up files: what the functions write of a model and of its cut, joined by the bytes of state."""
    dense, ids = tiny_model(state=8), tokens(7, 24)
    data = sspruner.calibration(ids, dense, samples=4, held_out=3)
    sspruner.compare(dense, ["random"], sparsities=(0.5,), calibration=data, out=tmp_path).save(tmp_path)
    plan = sspruner.plan(sspruner.trace(dense), sspruner.score(dense, "random"), sparsity=0.5)
    models = {"dense": dense, "cut": sspruner.apply(tiny_model(state=8), plan)}
    rates: dict[str, Any] = {"device": "cpu", "bandwidth": 1e10, "flops": 1e10}
    found = sspruner.bench(models, batches=(1, 2), prompt=4, generate=2, repeats=2, **rates)
    found.save(tmp_path / "bench.json")
    how: dict[str, Any] = {"text": ids, "max_length": 8, "metrics": ["perplexity", "position", "length"]}
    evaluation = sspruner.evaluate(models["cut"], against=dense, **how)
    (tmp_path / "evaluation.json").write_text(evaluation.to_json())
    shown = sections(read_folder(tmp_path))
    names = figures(shown)
    assert {"compare-perplexity-ratio", "compare-pareto-bytes", "compare-pareto-speed"} <= names
    assert any(name.startswith("bench") for name in names)
    page = Page(sspruner.report(tmp_path).read_text(encoding="utf-8"))
    text = " ".join(page.cells)
    for interval in (evaluation["perplexity"].change, evaluation["kl_to_dense"].value):
        assert interval is not None
        assert any(same(cell, list(interval)) for cell in page.cells if numbers(cell)), (interval, text)


@pytest.mark.slow
def test_the_earlier_pictures_come_back_if_new_ones_cannot_take_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bench.json").write_text(json.dumps(BENCH))
    sspruner.report(tmp_path)
    before, rename = tree(tmp_path), pages.os.rename

    def failing(source: Path, target: Path) -> None:
        if Path(source).name == "new":
            raise OSError("no space left on device")
        rename(source, target)

    monkeypatch.setattr(pages.os, "rename", failing)
    with pytest.raises(sspruner.InputError, match="no space left"):
        sspruner.report(tmp_path)
    assert tree(tmp_path) == before
