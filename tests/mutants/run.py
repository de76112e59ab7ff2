"""Run the deliberate faults of faults.toml against the fast tests: `make mutants`.

The project is copied to a temporary folder; the checkout is never edited. First all named tests run on the copy as it
is and have to pass. Then one fault at a time is written into the copy and its tests run. The exit code is 1 if a fault
escapes, 2 if the list does not fit the code or the tests.
"""

from __future__ import annotations

import argparse
import compileall
import json
import multiprocessing
import os
import queue
import shutil
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from py_compile import PycInvalidationMode

from faults import AREAS, LIST, ROOT, Fault, ListError, find_tests, load_faults
from rich.console import Console
from rich.table import Table

LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.egg-info", "mutants")
LEFT_OUT_AT_THE_TOP = shutil.ignore_patterns(".git", ".venv*", ".*_cache", "build", "dist", "results", "pruned")
FAST = "not slow"  # what `make test` runs
LOG = "pytest.log"  # beside the copy
SECONDS = 1800  # after which a test run counts as failed
PASSED, FAILED = 0, 1  # pytest's exit codes; 2 and 3: a fault that no test survives, such as one on import
NO_TESTS = (4, 5)
# Test processes are forks of one that has imported what takes long, and nothing of this project.
PRELOADED = ["pytest", "hypothesis", "torch", "datasets", "safetensors.torch", "torch_pruning"]
FAMILIES = ("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "mamba", "mamba2", "nemotron_h")
PRELOADED += [f"transformers.models.{name}.modeling_{name}" for name in (*FAMILIES, "zamba", "zamba2")]
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(PRELOADED)


@dataclass(frozen=True)
class Tests:
    """What one pytest run found: exit code, names of tests that passed, the first that failed, wall seconds."""

    code: int
    passed: frozenset[str]
    failed: str
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """What the tests made of one fault. caught_by is "" for a fault that escaped."""

    fault: Fault
    caught_by: str
    seconds: float


def copy_project(root: Path, folder: Path) -> Path:
    """Copy the project without what is built, cached or not its own; and without the list itself."""
    tree = folder / "tree"

    def left_out(place: str, names: list[str]) -> set[str]:
        return LEFT_OUT(place, names) | (LEFT_OUT_AT_THE_TOP(place, names) if Path(place) == root else set())

    shutil.copytree(root, tree, ignore=left_out)
    for package in ("sspruner", "sspruner_plugins"):  # bytecode that is checked against the text, not against its time
        compileall.compile_dir(tree / package, quiet=1, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
    return tree


def run_tests(tree: Path, nodes: Sequence[str], *options: str) -> Tests:
    """Run some tests of a copy of the project, or all without `nodes`, in a process of their own."""
    report = tree.with_name("report.xml")
    report.unlink(missing_ok=True)
    command = [
        "-q", "-n0", "-m", FAST, "-p", "no:cacheprovider", "--assert=plain", f"--junitxml={report}", *options, *nodes,
    ]  # fmt: skip
    start = time.monotonic()
    child = PROCESSES.Process(target=pytest_in, args=(str(tree), command))
    child.start()
    child.join(SECONDS)
    if child.is_alive():
        child.kill()
        child.join()
        return Tests(FAILED, frozenset(), f"more than {SECONDS} seconds", time.monotonic() - start)
    if not report.is_file():
        raise ListError(f"{_log(tree)}\nthe tests do not start: exit code {child.exitcode}")
    passed, failed = set[str](), ""
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}.py::{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            failed = failed or name
        elif case.find("skipped") is None:
            passed.add(name.partition("[")[0])
    return Tests(child.exitcode or 0, frozenset(passed), failed, time.monotonic() - start)


def pytest_in(tree: str, command: list[str]) -> None:
    """Run pytest in a copy of the project and exit with its code. Called in a new process."""
    os.chdir(tree)
    # Subprocesses of tests import the copy, too. No bytecode is written: a file that changes twice in a second may be
    # taken for its older self.
    os.environ |= {"PYTHONPATH": tree, "PYTHONDONTWRITEBYTECODE": "1", "HYPOTHESIS_PROFILE": "mutants"}
    sys.path.insert(0, tree)
    sys.dont_write_bytecode = True
    with Path(tree).with_name(LOG).open("wb") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    import pytest

    import sspruner

    if not Path(sspruner.__file__).is_relative_to(tree):
        raise ImportError(f"{sspruner.__file__} is not the copy in {tree}")
    os._exit(pytest.main(command))


def _log(tree: Path) -> str:
    """Read the end of what the last run in a copy has printed."""
    return tree.with_name(LOG).read_text(encoding="utf-8", errors="replace")[-5000:]


def check_baseline(tree: Path, nodes: Sequence[str]) -> None:
    """Raise ListError unless the tests pass without any fault, each of them in at least one of its cases."""
    found = run_tests(tree, nodes, "-x")
    if found.code != PASSED:
        raise ListError(f"{_log(tree)}\nwithout any fault the tests fail: {found.failed or f'exit code {found.code}'}")
    missing = [node for node in nodes if node.rpartition("/")[2] not in found.passed]
    if missing:
        raise ListError(f"{', '.join(missing)}: not among the fast tests, or skipped; name other tests")


def try_fault(tree: Path, fault: Fault, nodes: Sequence[str]) -> Outcome:
    """Write one fault into the copy, run its tests, and take it out again."""
    path, text = tree / fault.file, fault.write(tree)
    try:
        found = run_tests(tree, nodes, "-x")
    finally:
        path.write_text(text, encoding="utf-8")
    if found.code in NO_TESTS:
        raise ListError(f"{fault.name}: pytest finds none of its tests")
    caught = "" if found.code == PASSED else found.failed or f"pytest exits with {found.code}"
    return Outcome(fault, caught, found.seconds)


def run(
    faults: Sequence[Fault],
    *,
    root: Path = ROOT,
    jobs: int = 1,
    all_tests: bool = False,
    console: Console | None = None,
) -> Iterator[Outcome]:
    """Try faults on copies of the project, one copy for each job: their outcomes, in order.

    all_tests: run the whole fast set until the first failure, instead of the tests that the list names.
    """
    for why in filter(None, (fault.problem(root) for fault in faults)):
        raise ListError(why)
    node = find_tests({test for fault in faults for test in fault.tests}, root)
    with _copies(root, jobs) as trees, ThreadPoolExecutor(jobs) as pool:

        def lent(work, *args):
            tree = trees.get()
            try:
                return work(tree, *args)
            finally:
                trees.put(tree)

        nodes = sorted(node.values())
        if console:
            count = "all" if all_tests else len(nodes)
            console.print(f"{count} tests without any fault ...", highlight=False)
        parts = [()] if all_tests else [part for i in range(jobs) if (part := nodes[i::jobs])]
        for _ in pool.map(lambda part: lent(check_baseline, part), parts):
            pass
        named = [() if all_tests else tuple(node[test] for test in fault.tests) for fault in faults]
        yield from pool.map(lambda fault, part: lent(try_fault, fault, part), faults, named)


@contextmanager
def _copies(root: Path, jobs: int) -> Iterator[queue.Queue[Path]]:
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trees: queue.Queue[Path] = queue.Queue()
        for job in range(jobs):
            trees.put(copy_project(root, Path(folder).resolve() / str(job)))
        yield trees


def table(outcomes: Sequence[Outcome]) -> Table:
    """Draw what became of each fault."""
    caught = sum(bool(outcome.caught_by) for outcome in outcomes)
    drawn = Table(title=f"{caught} of {len(outcomes)} deliberate faults caught")
    for column in ("fault", "area", "caught by"):
        drawn.add_column(column, overflow="fold")
    drawn.add_column("seconds", justify="right")
    for outcome in outcomes:
        by = outcome.caught_by or ("[red]ESCAPED" if outcome.fault.caught_before else "[red]ESCAPED (before, too)")
        drawn.add_row(outcome.fault.name, outcome.fault.area, by, f"{outcome.seconds:.1f}")
    return drawn


def chosen(faults: Sequence[Fault], only: Sequence[str]) -> list[Fault]:
    """Choose the faults of some areas, or with some words in their names; all without any."""
    found = [f for f in faults if not only or any(o == f.area or o in f.name for o in only)]
    if not found:
        raise ListError(f"no fault of area or name {', '.join(only)}; areas: {', '.join(AREAS)}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Run deliberate faults against the fast tests.")
    parser.add_argument("--jobs", type=int, default=1, help="faults that are tried at once (default: 1)")
    only = f"an area ({', '.join(AREAS)}) or a part of a name; may be given several times"
    parser.add_argument("--only", action="append", default=[], metavar="AREA/NAME", help=only)
    parser.add_argument("--all-tests", action="store_true", help="run all fast tests, not only those that are named")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    asked = parser.parse_args(arguments)
    progress = Console(stderr=True)
    outcomes = []
    try:
        faults = chosen(load_faults(LIST), asked.only)
        for outcome in run(faults, jobs=max(1, asked.jobs), all_tests=asked.all_tests, console=progress):
            outcomes.append(outcome)
            said = f"[{len(outcomes)}/{len(faults)}] {outcome.fault.name}: {outcome.caught_by or 'ESCAPED'}"
            progress.print(said, markup=False, highlight=False, soft_wrap=True)
    except ListError as error:
        progress.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return 2
    if asked.json:
        rows = [{**asdict(o.fault), "caught_by": o.caught_by, "seconds": round(o.seconds, 1)} for o in outcomes]
        print(json.dumps({"caught": sum(bool(o.caught_by) for o in outcomes), "faults": rows}, indent=2))
    else:
        Console().print(table(outcomes))
    return int(not all(outcome.caught_by for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
