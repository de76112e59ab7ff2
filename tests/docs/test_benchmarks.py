"""docs/benchmarks.md: made by scripts that exist and that `make bench` runs; the README quotes it."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from support.paths import ROOT

PAGE, SCALING = ((ROOT / f"docs/{name}.md").read_text(encoding="utf-8") for name in ("benchmarks", "scaling"))
MARK = re.compile(r"<!-- (.+): (begin|end) -->")
FIXED = {"| method | 10 % | 30 % | 50 % | 70 % | 90 % |"}  # published by others: no script makes it


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location("bench_all", ROOT / "benchmarks/all.py")
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules["bench_all"] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.pop(0)


def outside(page: str) -> list[str]:
    """Heads of tables that lie between no marks. Fails where marks do not pair up."""
    inside, heads, before = "", [], ""
    for line in page.splitlines():
        if found := MARK.fullmatch(line):
            name, what = found.groups()
            assert inside == ("" if what == "begin" else name), line
            inside = name if what == "begin" else ""
        elif line.startswith("|") and not before.startswith("|") and not inside:
            heads.append(line)
        before = line
    assert not inside
    return heads


def test_every_table_lies_between_marks() -> None:
    assert set(outside(PAGE)) == FIXED
    assert set(outside(SCALING)) == {"| | distillation, gradual | TwIST | calibration |"}


def test_a_table_by_hand_is_found() -> None:
    assert outside("<!-- a: begin -->\n| x |\n| --- |\n<!-- a: end -->\n\n| y |\n| --- |\n") == ["| y |"]
    with pytest.raises(AssertionError):
        outside("<!-- a: begin -->\n<!-- b: end -->")


def test_marks_are_the_parts_that_make_bench_runs_and_their_scripts_exist(bench: ModuleType) -> None:
    marks = [name for name, what in MARK.findall(PAGE + SCALING) if what == "begin"]
    assert sorted(marks) == sorted(part.name for part in bench.PARTS if part.script != "train_recall")
    assert all((ROOT / "benchmarks" / f"{part.script}.py").is_file() for part in bench.PARTS)
    names = {part.name for part in bench.PARTS}
    assert all(set(part.after) <= names for part in bench.PARTS)
    assert "benchmarks/all.py" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_a_part_runs_once_and_one_that_fails_leaves_the_page_alone(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, scripts = tmp_path / "page.md", tmp_path / "scripts"
    page.write_text("prose\n<!-- a: begin -->\nold\n<!-- a: end -->\nmore\n", encoding="utf-8")
    scripts.mkdir()
    (scripts / "good.py").write_text(
        "import sys; open(sys.argv[1], 'a').write('x'); print('new', sys.argv[1])", encoding="utf-8"
    )
    (scripts / "bad.py").write_text("print('half'); raise SystemExit(3)", encoding="utf-8")
    monkeypatch.setattr(bench, "HERE", scripts)
    monkeypatch.setattr(bench, "PAGE", page)
    good = bench.Part("a", "good", ("WORK/ran",), ("WORK/ran",), data=False)
    monkeypatch.setattr(bench, "PARTS", (bench.Part("a", "bad", data=False),))
    monkeypatch.setattr(sys, "argv", ["all.py", "--work", str(tmp_path)])
    with pytest.raises(SystemExit, match="failed: a"):
        bench.main()
    assert "old" in page.read_text(encoding="utf-8")
    monkeypatch.setattr(bench, "PARTS", (good,))
    bench.main()
    bench.main()
    assert (tmp_path / "ran").read_text() == "x"
    assert "begin -->\nnew WORK/ran\n" in page.read_text(encoding="utf-8")  # no path of this machine
    assert "old" not in page.read_text(encoding="utf-8")


def test_the_readme_quotes_numbers_of_the_page() -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    quoted = re.search(r"rise by ([\d.]+) %, where GHOST's selection costs ([\d.]+) % \(\[measured so\]", readme)
    assert quoted
    cells = {row: re.search(rf"^\| {row} \|(.*)\|$", balanced(), re.MULTILINE) for row in ("ghost", "balanced")}
    dense = float(re.search(r"dense ([\d.]+)", balanced()).group(1))  # type: ignore[union-attr]
    for row, percent in zip(("balanced", "ghost"), quoted.groups(), strict=True):
        found = cells[row]
        assert found
        at_90 = float(found.group(1).split("|")[2].split("±")[0])
        assert float(percent) == round(100 * (at_90 / dense - 1), 1)


def balanced() -> str:
    return PAGE.split("<!-- damage.py: begin -->")[1].split("\n**KL")[0]
