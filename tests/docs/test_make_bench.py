"""`make bench`: a part runs once and after what it needs; quick runs have a folder of their own."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def test_a_part_runs_once_and_one_that_fails_leaves_the_page_alone(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, run = tmp_path / "page.md", tmp_path / "run.py"
    page.write_text("prose\n<!-- a: begin -->\nold\n<!-- a: end -->\nmore\n", encoding="utf-8")
    good = "import sys; work = sys.argv[5]; open(f'{work}/ran', 'a').write('x'); print('new', sys.argv[1], work)"
    monkeypatch.setattr(bench, "RUN", run)
    monkeypatch.setattr(bench, "DOCS", tmp_path)
    monkeypatch.setattr(bench, "draw", lambda pages, folder: None)
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures/damage.py").touch()
    monkeypatch.setattr(bench, "PARTS", {"a": importlib.import_module("run").Part("a", study="a")})
    monkeypatch.setattr(sys, "argv", ["all.py", "--work", str(tmp_path)])
    run.write_text("print('half'); raise SystemExit(3)", encoding="utf-8")
    with pytest.raises(SystemExit, match="failed: a"):
        bench.main()
    assert "old" in page.read_text(encoding="utf-8")
    run.write_text(good, encoding="utf-8")
    bench.main()
    bench.main()
    assert (tmp_path / "ran").read_text() == "x"
    assert "begin -->\nnew a WORK\n" in page.read_text(encoding="utf-8")  # no path of this machine
    assert "old" not in page.read_text(encoding="utf-8")


def test_a_part_begins_when_what_it_needs_is_there(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it stands in the file, and beside parts that need nothing."""
    made, run = importlib.import_module("run").Part, tmp_path / "run.py"
    parts = [made("late", after=("slow",)), made("quick"), made("slow"), made("later", after=("late", "quick"))]
    run.write_text(
        "import sys, time; name, work = sys.argv[1], sys.argv[5]\n"
        "open(f'{work}/order', 'a').write(f'{name} begins '); time.sleep(name == 'slow')\n"
        "open(f'{work}/order', 'a').write(f'{name} ends ')"
    )
    monkeypatch.setattr(bench, "RUN", run)
    monkeypatch.setattr(bench, "insert", lambda name, text: None)
    monkeypatch.setattr(bench, "DOCS", tmp_path)
    monkeypatch.setattr(bench, "draw", lambda pages, folder: None)
    monkeypatch.setattr(bench, "PARTS", {one.name: one for one in parts})
    monkeypatch.setattr(sys, "argv", ["all.py", "--work", str(tmp_path)])
    bench.main()
    order = (tmp_path / "order").read_text()
    for one in parts:
        for needed in one.after:
            assert order.index(f"{needed} ends") < order.index(f"{one.name} begins")


def test_a_quick_run_leaves_what_whole_ones_made(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Models of a few steps take no other's place: settings that name WORK, and the folder of cells."""
    run, seen = importlib.import_module("run"), list[Any]()
    part = run.Part("a", study="a", settings={"out": "WORK/model"}, quick={"steps": 1})
    monkeypatch.setattr(run, "read_parts", lambda: {"a": part})
    monkeypatch.setattr(run.Part, "function", property(lambda _: lambda s: seen.append(s) or (["made"], "note")))
    for quick in ([], ["--quick"]):
        monkeypatch.setattr(sys, "argv", ["run.py", "a", "--work", str(tmp_path), *quick])
        run.main()
    assert [(s.out, s.work, s.quick) for s in seen] == [
        (f"{tmp_path}/model", tmp_path, False), (f"{tmp_path}/quick/model", tmp_path / "quick", True)
    ]  # fmt: skip
    assert "made" in capsys.readouterr().out
