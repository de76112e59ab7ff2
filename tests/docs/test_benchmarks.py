"""Results in docs/: made by parts that exist and that `make bench` runs; the README quotes them."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import math
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml

import sspruner
from sspruner.evaluation.damage import damages
from sspruner.files import strict_json
from sspruner.recipes.compare import CompareRecipe
from sspruner.recipes.measure import BenchOptions
from sspruner.scoring.known import find_scorer
from sspruner.testing.models import zoo
from sspruner.testing.plans import random_plan
from support.paths import ROOT
from support.pictures import check_drawn, script

MARK = re.compile(r"<!-- (.+): (begin|end) -->")
PAGES = [page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if MARK.search(page)]
TEXT = "".join(PAGES)
BY_HAND = [  # no script makes them: published by others, formulas, sizes
    *["| claim | published | ours | here |"] * 4,
    "| method | 10 % | 30 % | 50 % | 70 % | 90 % |",
    "| method | 25 % | 50 % | 75 % |",
    "| | distillation, gradual | TwIST | calibration |",
    "| states | fp32 | bf16, fp16 | int8, fp8 |",
    "| you serve | first | what it gives, at most |",
]

BENCHMARKS = ROOT / "benchmarks"
MOST_LINES = 3_500  # of Python; 2,000 before full states, recall, other models, when it pays and a GPU had studies


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
    assert sorted(head for page in PAGES for head in outside(page)) == sorted(BY_HAND)


def test_a_table_by_hand_is_found() -> None:
    assert outside("<!-- a: begin -->\n| x |\n| --- |\n<!-- a: end -->\n\n| y |\n| --- |\n") == ["| y |"]
    with pytest.raises(AssertionError):
        outside("<!-- a: begin -->\n<!-- b: end -->")


def test_marks_are_the_parts_that_make_bench_runs_and_their_files_exist(bench: ModuleType) -> None:
    marks = [mark for mark, what in MARK.findall(TEXT) if what == "begin"]
    assert sorted(marks) == sorted(part.name for part in bench.PARTS.values() if not part.trains)
    assert all(part.files and all(file.is_file() for file in part.files) for part in bench.PARTS.values())
    assert all(set(part.after) <= set(bench.PARTS) for part in bench.PARTS.values())
    assert "benchmarks/all.py" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_every_table_names_the_part_that_makes_it(bench: ModuleType) -> None:
    sections = re.findall(r"^<!-- (\S+): begin -->\n(.*?)^<!-- \1: end -->", TEXT, re.DOTALL | re.MULTILINE)
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
    for name in ("decode", "projection_cost", "engines", "engines_130m"):
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
    subject.model.backbone.norm_f.weight.data.mul_(1.1)
    with pytest.raises(TypeError):  # of another model there is no cell, and one that cannot be made ends the part
        experiment.measured(subject, section, tmp_path / "work")
    tolerant = experiment.measured(subject, replace(section, may_fail=True), tmp_path / "work")
    assert "error" in tolerant.cells["magnitude", "90%"][0]


def test_python_of_benchmarks_is_short() -> None:
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in BENCHMARKS.rglob("*.py"))
    assert lines < MOST_LINES


def part(name: str) -> str:
    return TEXT.partition(f"<!-- {name}: begin -->")[2].partition(f"<!-- {name}: end -->")[0]


def rows(text: str) -> dict[str, dict[str, str]]:
    """The first table of a text: row -> column -> cell."""
    lines = re.search(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    assert lines
    head, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[0].splitlines()]
    return {cells[0]: dict(zip(head[1:], cells[1:], strict=True)) for cells in body}


def increase(perplexity: str, dense: str) -> str:
    return f"+{100 * (float(perplexity.split()[0]) / float(dense) - 1):.1f} %"


def test_the_readme_quotes_numbers_of_the_pages() -> None:
    readme = rows((ROOT / "README.md").read_text(encoding="utf-8").partition("<!-- results: begin -->")[2])
    reconstruct = rows(part("reconstruct"))
    for label, row in {
        "Mamba2, 32 of 128": "mamba2-books-4m state, 32 of 128",
        "Mamba2, 13 of 128": "mamba2-books-4m state, 13 of 128",
        "Mamba1, 4 of 16": "mamba1-books state, 4 of 16",
    }.items():
        for quoted, column in zip(list(readme[label].values()), ("none", "reconstruct", "balanced"), strict=False):
            found = re.match(r"([+-][\d.]+)%", reconstruct[row][column])
            assert quoted == (f"{float(found[1]):+.1f} %" if found else "has none"), (label, column)
    for name, label, column, cells in (
        ("damage", "Mamba2, 64 of 128", "50% (keeps 64)", ("ghost", "ghost, reconstruct", "balanced")),
        ("delta", "gated delta net, 16 of 64", "1/4 (keeps 16)", ("ghost", "ghost, reconstruct", "balanced")),
    ):
        dense = re.search(r"dense ([\d.]+)", part(name))
        assert dense
        for quoted, row in zip(list(readme[label].values()), cells, strict=False):
            assert quoted == increase(rows(part(name))[row][column], dense[1]), (label, row)


def test_the_readme_quotes_published_numbers_of_the_page() -> None:
    readme = rows((ROOT / "README.md").read_text(encoding="utf-8").partition("<!-- results: begin -->")[2])
    labels = {"50 %": "Mamba2, 64 of 128", "75 %": "Mamba2, 32 of 128", "90 %": "Mamba2, 13 of 128"}
    for intro, row, place in (
        ("Mamba2-1.3B, WikiText-2", "GHOST", -2),
        ("Phi-Mamba-1.5B, WikiText-2", "Taylor, second form", -1),
    ):
        text = TEXT.partition(f"\n{intro}")[2]
        dense = re.search(r"dense ([\d.]+)", text)
        assert dense
        published = rows(text)[row]
        for cut, label in labels.items():
            expected = increase(published[cut], dense[1]) if cut in published else "–"
            assert list(readme[label].values())[place] == expected, (row, cut)


def test_the_readme_quotes_the_model_whose_state_is_full() -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    table = rows(part("dictionaries").partition("mamba2-dictionaries, state cut")[2])
    names = "ghost", "ghost, reconstruct", "balanced"
    ghost, reconstructed, balanced = (f"{100 * (float(table[name]['50%'].split()[0]) - 1):+.0f} %" for name in names)
    assert f"half of it costs {ghost} by GHOST, {reconstructed} reconstructed, {balanced} balanced." in readme


def test_the_readmes_picture_is_that_of_the_table(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = script("damage")
    found, cells = picture["curves"](TEXT), rows(part("reconstruct"))
    for column, curve in found.items():
        assert sorted(curve) == [4, 13, 32]
        for kept, interval in curve.items():
            cell = cells[f"mamba2-books-4m state, {kept} of 128"][column]
            assert cell.startswith("{:+.2f}% ({:+.2f}% to {:+.2f}%)".format(*interval))
    picture["main"](tmp_path)
    check_drawn(tmp_path, "damage")


def test_a_part_has_one_page(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "DOCS", tmp_path)
    for name in ("one", "two"):
        marks = [f"<!-- {part}: {what} -->" for part in ("both", name) for what in ("begin", "end")]
        (tmp_path / f"{name}.md").write_text("before\n{}\n{}\n{}\n{}\nafter\n".format(*marks), encoding="utf-8")
    bench.insert("two", "new\n")
    assert "new" not in (tmp_path / "one.md").read_text(encoding="utf-8")
    assert (
        (tmp_path / "two.md")
        .read_text(encoding="utf-8")
        .endswith("<!-- two: begin -->\nnew\n\n<!-- two: end -->\nafter\n")
    )
    for name, count in (("both", 2), ("none", 0)):
        with pytest.raises(SystemExit, match=f"marks of {name} stand in {count} pages"):
            bench.insert(name, "new")


def on_a_gpu(where: Path) -> dict[str, dict]:
    """What every block of benchmarks/gpu.py has written."""
    return {file.stem: strict_json.loads(file.read_text(encoding="utf-8")) for file in where.glob("*.json")}


@pytest.mark.slow
def test_the_gpu_script_runs_as_a_whole_on_a_cpu(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every job of every block measures something tiny; one block ends without a word, and the next one runs."""
    gpu = importlib.import_module("gpu")
    blocks = yaml.safe_load(gpu.RECIPE.read_text(encoding="utf-8"))
    recipe = tmp_path / "gpu.yaml"
    recipe.write_text(
        yaml.safe_dump({"broken": {"share": 0.1, "tiny": {}}} | blocks, sort_keys=False), encoding="utf-8"
    )
    monkeypatch.setattr(gpu, "RECIPE", recipe)
    monkeypatch.setattr(
        sys, "argv", ["gpu.py", "--device", "cpu", "--tiny", "--minutes", "100", "--out", str(tmp_path)]
    )
    gpu.main()
    text, found = capsys.readouterr().out, on_a_gpu(tmp_path)
    assert (tmp_path / "gpu.md").read_text(encoding="utf-8") == text.removesuffix("\n")
    assert found.pop("broken")["jobs"] == {"broken": {"why": "not run: its process ended with 1"}}
    assert found.keys() == blocks.keys()
    for name, record in found.items():
        assert record["facts"] == {"card": "no GPU, cpu", "kernels": "transformers' own code, no kernels"}, name
        assert not [job for job in record["jobs"].values() if job.get("why") or job.get("wrong")], name
    assert "1 of 1 families exact" in text
    speed = rows(text.partition("**speed-1.3b")[2])
    assert [*speed] == ["decode, batch 1", "decode, batch 2", "prefill, batch 1"]
    assert all(re.fullmatch(r"[\d.]+ \([\d.]+ to [\d.]+\)", row["state 64 / dense"]) for row in speed.values())
    for row in rows(text.partition("**training")[2]).values():
        first, last = map(float, row["loss"].split(" to "))
        assert last < first
    assert rows(text.partition("**scoring")[2])["ghost"]["proof's error"].startswith(("0e", "1e-0", "2e-0", "3e-0"))


def test_a_job_on_a_gpu_that_fails_stops_no_other(bench: ModuleType, tmp_path: Path) -> None:
    gpu, file = importlib.import_module("gpu"), tmp_path / "speed.json"

    def no_room() -> dict:
        assert on_a_gpu(tmp_path)["speed"]["jobs"]["batch 1"] == {"rows": [1]}  # on the disk already
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 17.18 GiB")

    def fails() -> dict:
        raise RuntimeError("causal_conv1d: strides\nmust be multiples of 8")

    jobs = {
        "batch 1": lambda: {"rows": [1]},
        "batch 512": no_room,
        "graph": fails,
        "last": lambda: {"rows": [math.inf]},
    }
    gpu.run_jobs(jobs, file, {}, time.time() + 1000)
    assert on_a_gpu(tmp_path)["speed"]["jobs"] == {
        "batch 1": {"rows": [1]},
        "batch 512": {"why": "does not fit into memory"},
        "graph": {"why": "RuntimeError: causal_conv1d: strides must be multiples of 8"},
        "last": {"rows": [math.inf]},
    }


def test_a_job_on_a_gpu_for_which_no_time_is_left_is_listed(bench: ModuleType, tmp_path: Path) -> None:
    """None begins after the deadline, nor one that would pass it if it took as long as the one before."""
    gpu = importlib.import_module("gpu")
    clock = iter([0.0, 60.0, 60.0, 60.0])  # the first job begins and ends, two others would begin
    jobs = {name: lambda: {"rows": []} for name in ("first", "second", "third")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu.time, "time", lambda: next(clock))
        gpu.run_jobs(jobs, tmp_path / "speed-2.7b.json", {"card": "H"}, 100.0)
    left = {"why": "not run: time"}
    assert on_a_gpu(tmp_path)["speed-2.7b"]["jobs"] == {"first": {"rows": []}, "second": left, "third": left}
    text = "\n".join(gpu.drawn(tmp_path, ["speed-2.7b"]))
    assert "– second: not run: time" in text
    assert "speed-2.7b: H" in text


def test_without_a_gpu_the_table_says_that_it_was_not_run(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = importlib.import_module("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    made, _ = gpu.measured("cuda", 9, tmp_path / "out", tiny=False)
    assert made == [f"Not run: torch {torch.__version__} sees no GPU here."]
    assert not (tmp_path / "out").exists()
    assert "Not run: torch" in part("gpu") or "families exact" in part("gpu")


def test_a_part_that_trains_names_its_device_and_how_much_at_once(bench: ModuleType) -> None:
    train, model = importlib.import_module("studies.train"), torch.nn.Linear(1, 1)
    usual = train.settings_of(SimpleNamespace(), max_tokens=10, learning_rate=3e-3, seed=5)
    assert (usual.batch, usual.at_once, usual.every, usual.max_minutes, usual.bf16, usual.seed) == (
        8,
        8,
        100,
        None,
        True,
        5,
    )
    lent = train.settings_of(SimpleNamespace(batch=64, at_once=32, every=500, max_minutes=4), max_tokens=10, seed=5)
    assert (lent.batch, lent.at_once, lent.every, lent.max_minutes) == (64, 32, 500, 4)
    assert train.on_its_device(model, SimpleNamespace()) is model
    with pytest.raises(sspruner.SSPrunerError, match="device 'nowhere'"):
        train.on_its_device(model, SimpleNamespace(device="nowhere"))


def test_cuts_on_a_gpu_have_sizes_that_kernels_take(bench: ModuleType) -> None:
    how = yaml.safe_load((BENCHMARKS / "recipes/gpu.yaml").read_text(encoding="utf-8"))["exactness"]
    graph = sspruner.trace(zoo("mamba2", **how["sizes"]))
    cuts = [random_plan(graph, ("state", "head_dim"), seed, multiple_of=8) for seed in range(10)]
    assert {group.after for cut in cuts for group in cut.groups.values()} == {8}
