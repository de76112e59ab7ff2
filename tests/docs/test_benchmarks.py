"""docs/benchmarks.md: made by parts that exist and that `make bench` runs; the README quotes it."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import sspruner
from sspruner.evaluation.damage import damages
from sspruner.recipes.compare import CompareRecipe
from sspruner.recipes.measure import BenchOptions
from sspruner.scoring.known import find_scorer
from support.paths import ROOT

PAGES = {
    name: (ROOT / f"docs/{name}").read_text(encoding="utf-8")
    for name in ("benchmarks.md", "scaling.md", "when-it-pays.md")
}
PAGE, SCALING, PAYS = PAGES.values()
MARK = re.compile(r"<!-- (.+): (begin|end) -->")
FIXED = {"| method | 10 % | 30 % | 50 % | 70 % | 90 % |"}  # published by others: no script makes it


BENCHMARKS = ROOT / "benchmarks"
MOST_LINES = 2_000  # of Python; 4,500 before experiments were recipes


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """Import benchmarks/all.py as `make bench` does: from its own folder."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("bench_all", BENCHMARKS / "all.py")
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules["bench_all"] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
                del sys.modules[name]


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
    assert set(outside(PAYS)) == {"| states | fp32 | bf16, fp16 | int8, fp8 |"}


def test_a_table_by_hand_is_found() -> None:
    assert outside("<!-- a: begin -->\n| x |\n| --- |\n<!-- a: end -->\n\n| y |\n| --- |\n") == ["| y |"]
    with pytest.raises(AssertionError):
        outside("<!-- a: begin -->\n<!-- b: end -->")


def test_marks_are_the_parts_that_make_bench_runs_and_their_files_exist(bench: ModuleType) -> None:
    for name, page in PAGES.items():
        marks = [mark for mark, what in MARK.findall(page) if what == "begin"]
        assert sorted(marks) == sorted(p.name for p in bench.PARTS.values() if not p.trains and p.page == name)
    assert all(part.files and all(file.is_file() for file in part.files) for part in bench.PARTS.values())
    assert all(set(part.after) <= set(bench.PARTS) for part in bench.PARTS.values())
    assert "benchmarks/all.py" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_every_table_names_the_part_that_makes_it(bench: ModuleType) -> None:
    sections = re.findall(
        r"^<!-- (\S+): begin -->\n(.*?)^<!-- \1: end -->", "".join(PAGES.values()), re.DOTALL | re.MULTILINE
    )
    wrong = {name: re.findall(r"`python benchmarks/run\.py ([^\s`]+)[^`]*`", body) for name, body in sections}
    wrong = {name: named for name, named in wrong.items() if named != [name] * (not bench.PARTS[name].gpu)}
    assert not wrong  # no GPU was at hand
    assert len(sections) == sum(not part.trains for part in bench.PARTS.values())


def test_every_study_and_every_recipe_is_used_by_a_part_or_a_study(bench: ModuleType) -> None:
    used = {file for part in bench.PARTS.values() for file in part.files}
    used.add(BENCHMARKS / "studies/__init__.py")
    assert {*BENCHMARKS.glob("recipes/*"), *BENCHMARKS.glob("studies/*.py")} == used


def test_importing_a_study_changes_no_other_module() -> None:
    """Code at the top of a file that sets a module's attribute would change the tests that run after its import."""
    for file in BENCHMARKS.rglob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            assert not [t for t in targets if isinstance(t, ast.Attribute)], f"{file.name}:{node.lineno}"


def test_every_study_has_tables_and_imports(bench: ModuleType) -> None:
    for part in bench.PARTS.values():
        assert callable(part.function)


def test_every_recipe_loads_with_its_class(bench: ModuleType) -> None:
    experiment, commands = importlib.import_module("experiment"), importlib.import_module("commands")
    for name in ("compare", "compare_recall"):
        assert CompareRecipe.load(BENCHMARKS / f"recipes/{name}.yaml").cells.scorers
    for name in ("decode", "gpu", "projection_cost", "engines", "engines_130m"):
        recipe = yaml.safe_load((BENCHMARKS / f"recipes/{name}.yaml").read_text(encoding="utf-8"))
        assert isinstance(commands.bench_options(recipe, quick=False), BenchOptions)
    cells = 0
    for file in {part.files[0] for part in bench.PARTS.values() if part.recipe and not part.study}:
        if hasattr(commands, file.stem):
            continue
        found = experiment.Experiment.load(file)
        assert callable(getattr(importlib.import_module("tables"), found.table))
        for section in found.sections:
            for model in section.models:
                for row in section.rows_of(model).values():
                    for cut in section.cuts_of(row).values():
                        cell = section.cell(row, cut)
                        if "scorer" in cell:
                            how = {key: value for key, value in cell.items() if key not in experiment.BESIDE}
                            recipe = sspruner.Recipe.of(**how)
                            assert find_scorer(recipe.method.scorer)
                            cells += 1
    assert cells > 200


@pytest.mark.slow
def test_an_experiment_measures_what_prune_cuts(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table of one cell on a text of our own: perplexity, KL, and cells that are kept."""
    experiment = importlib.import_module("experiment")
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.txt").write_text("The quick brown fox jumps over the lazy dog. " * 400, encoding="utf-8")
    section = experiment.Section(
        models=("mamba2-books-4m",), base={"axis": "state"}, once=True,
        rows={"magnitude": {"scorer": "magnitude"}}, cuts={"90%": {"sparsity": 0.9}},
        observed={"file": "a.txt", "windows": 1}, reported={"file": "a.txt", "windows": 2},
    )  # fmt: skip
    subject = experiment.Subject("mamba2-books-4m", data)
    found = experiment.measured(subject, section, tmp_path / "work")
    text = subject.text("a.txt", 2)
    plan = sspruner.plan(subject.graph, sspruner.score(subject.model, "magnitude"), sparsity=0.9)
    damage = damages(subject.model, [plan], subject.graph, text.batches(8))[0]
    (cell,) = found.cells["magnitude", "90%"]
    assert math.exp(float(found.dense.nll.mean())) == pytest.approx(damage.dense_perplexity, rel=1e-4)
    assert math.exp(float(cell.nll.mean())) == pytest.approx(damage.pruned_perplexity, rel=1e-4)
    assert float(cell.kl.mean()) == pytest.approx(damage.kl, rel=1e-3)
    monkeypatch.setattr(experiment, "version_of", None)  # a second run takes the cell from its file
    assert experiment.measured(subject, section, tmp_path / "work").cells["magnitude", "90%"][0].record == cell.record


def test_python_of_benchmarks_is_short() -> None:
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in BENCHMARKS.rglob("*.py"))
    assert lines < MOST_LINES


def test_a_part_runs_once_and_one_that_fails_leaves_the_page_alone(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, run = tmp_path / "page.md", tmp_path / "run.py"
    page.write_text("prose\n<!-- a: begin -->\nold\n<!-- a: end -->\nmore\n", encoding="utf-8")
    good = "import sys; work = sys.argv[5]; open(f'{work}/ran', 'a').write('x'); print('new', sys.argv[1], work)"
    monkeypatch.setattr(bench, "RUN", run)
    monkeypatch.setattr(bench, "DOCS", tmp_path)
    monkeypatch.setattr(bench, "PARTS", {"a": importlib.import_module("run").Part("a", study="a", page="page.md")})
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


def test_the_readme_quotes_numbers_of_the_page() -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    quoted = re.search(r"rises by ([\d.]+) %, and by ([\d.]+) % with GHOST's selection \(\[measured so\]", readme)
    assert quoted
    cells = {row: re.search(rf"^\| {row} \|(.*)\|$", balanced(), re.MULTILINE) for row in ("ghost", "balanced")}
    dense = float(re.search(r"dense ([\d.]+)", balanced()).group(1))  # type: ignore[union-attr]
    for row, percent in zip(("balanced", "ghost"), quoted.groups(), strict=True):
        found = cells[row]
        assert found
        at_90 = float(found.group(1).split("|")[2].split("±")[0])
        assert float(percent) == round(100 * (at_90 / dense - 1), 1)


def balanced() -> str:
    return PAGE.split("<!-- damage: begin -->")[1].split("\n**KL")[0]
