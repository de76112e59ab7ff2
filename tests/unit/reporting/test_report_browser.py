"""The report as a browser shows it: on a phone and on a screen, light and dark. Skipped where there is no Chromium."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sspruner
from sspruner.reporting.folder import read_folder
from sspruner.reporting.sections import sections
from sspruner.scoring.scores import Scores
from support.browser import NAMES, find_browser, seen
from support.reports import BENCH, EVALUATION, HOSTILE, bench_row, write

BROWSER = find_browser()

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"no Chromium on the path ({', '.join(NAMES)}); install one or set CHROME to it"
)


def content() -> dict[str, Any]:
    """A folder with every kind of result, names that are markup, and tables wider than any screen."""
    long = "a_scorer_with_a_name_" + "that_has_no_end" * 6
    cells = {
        name: {
            f"{s:g}": {
                "perplexity": [20 + i, 19, 29], "perplexity_ratio": [1 + s * i / 3, 1, 3], "kl_to_dense": [s**6, 0, 1],
                "top1_agreement": [0.5, 0.4, 0.6], "lambada_accuracy": [0.5, 0.4, 0.6], "recall_accuracy": [1, 0.5, 1],
                "state_bytes": round(1e6 * (1 - s)), "parameters": 10**9, "kept": {},
            }
            for s in (0.25, 0.5, 0.9)
        }
        for i, name in enumerate(["ghost", "taylor", HOSTILE, long])
    }  # fmt: skip
    cells["ghost"]["0.9"] = {"error": f"{HOSTILE} cannot be cut so far, for a reason that takes a whole line to tell"}
    compare = {
        "version": 1, "model": HOSTILE, "axis": "state", "sparsities": [0.25, 0.5, 0.9], "cells": cells,
        "dense": {"perplexity": [19, 18, 20], "state_bytes": 10**6, "parameters": 10**9, "kept": {}},
        "baseline": {"perplexity": 22, "state_bytes": 500_000, "parameters": 10**8, "kept": {}},
        "command": f"compare {long}",
        "calibration": {"source": "t", "tokens": 9, "held_out_tokens": 8, "held_out_is_separate": True},
        "versions": {}, "seed": 0, "from_cache": [],
    }  # fmt: skip
    rows = [bench_row(batch=b, model=m, state_bytes=s, tokens_per_second=[b * 9, b * 8, b * 10], path=long)
            for b in (1, 16, 64) for m, s in (("dense", 10**6), ("half", 500_000), (HOSTILE, 100_000))]  # fmt: skip
    made = torch.Generator().manual_seed(0)
    scored = {
        f"scores/{name}.safetensors": Scores(
            {f"a.long.path.of.layers.{i}.mixer:state": torch.rand(1, 64, generator=made) for i in range(24)},
            {"scorer": name, "calibration": calibration, **({"spectrum": "Singular values"} if name == "s" else {})},
        )
        for name, calibration in {"one": "", "two": "text", "s": "text"}.items()
    }
    plan = {"version": 1, "made_by": {"seed": 1}, "groups": {f"l.{i}:state": {"before": 64, "after": 64 - i}
            for i in range(48)}}  # fmt: skip
    return {"compare.json": compare, "bench.json": BENCH | {"rows": rows}, "evaluation.json": EVALUATION,
            "plan.json": plan, **scored}  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = write(tmp_path_factory.mktemp("report") / "results", content())
    return folder, sspruner.report(folder).read_text(encoding="utf-8")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_what_the_page_shows(report: tuple[Path, str], width: int, dark: bool, tmp_path: Path) -> None:
    folder, page = report
    found = seen(str(BROWSER), page, tmp_path, width, dark)
    shown = sections(read_folder(folder))
    assert found["console"] == []
    assert found["loaded"] == []
    assert found["scripts"] == 1  # that of the buttons to copy
    assert (found["width"], found["dark"]) == (width, dark)
    assert (found["paper"] < 0.1) if dark else (found["paper"] > 0.9)
    assert found["overflow"] == [0, 0]
    assert found["wide"] == 0
    assert found["faint"] == []
    assert found["texts"] > 1000
    assert found["drawn"] > 100
    assert (found["ids"], found["broken"]) == ([], [])
    assert [title for title in found["headings"] if title in {s.title for s in shown}] == [s.title for s in shown]
    pictured = {figure.title: figure for section in shown for figure in section.figures}
    assert [figure["title"] for figure in found["figures"]] == list(pictured)
    assert len(pictured) == 11
    for figure in found["figures"]:
        left, right, wide, high = figure["picture"]
        assert left >= 0
        assert right <= width
        assert wide >= 300
        assert 100 < high < 800
        assert figure["role"] == "img"
        assert figure["label"] == f"{figure['title']}. {pictured[figure['title']].says}"
        assert figure["caption"] == pictured[figure["title"]].says
        assert figure["rows"] == len(pictured[figure["title"]].table.rows)
        assert figure["marks"] > 10
    columns = {round(figure["box"][0]) for figure in found["figures"]}
    assert len(columns) == (1 if width == 390 else 2)


def test_lines_have_other_colours_in_the_dark(report: tuple[Path, str], tmp_path: Path) -> None:
    light, dark = (seen(str(BROWSER), report[1], tmp_path, 1280, theme)["figures"][0]["strokes"] for theme in (0, 1))
    assert "rgb(0, 114, 178)" in light
    assert "rgb(0, 114, 178)" not in dark
    assert len(light) == len(dark)


def test_the_measuring_sees_what_is_wrong(tmp_path: Path) -> None:
    page = """<!doctype html><body style="background: #fff; color: #999"><p>faint</p>
    <div style="width: 900px">wide</div><div><table style="width: 800px"><tr><td>x</td></tr></table></div>
    <p id="a">twice</p><p id="a">twice</p><a href="#nowhere">lost</a><img src="https://x.example/a.png">
    <script>console.error("complaint"); undefined.x</script>"""
    found = seen(str(BROWSER), page, tmp_path, 390)
    assert found["overflow"][0] > 400
    assert {said for said, _ in found["faint"]} >= {"faint", "wide", "twice"}
    assert (found["wide"], found["ids"], found["broken"]) == (1, ["a"], ["#nowhere"])
    assert found["loaded"] == ["https://x.example/a.png"]
    assert any("complaint" in line for line in found["console"])
    assert any("TypeError" in line for line in found["console"])
