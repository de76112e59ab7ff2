"""The list of deliberate faults fits the code and the tests as they are, so that it does not rot."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # a script that stands alone, not a package

from faults import AREAS, Fault, ListError, find_tests, load_faults

FAULTS = load_faults()


def test_there_are_faults_in_every_area():
    areas = [fault.area for fault in FAULTS]
    assert len(FAULTS) >= 40
    assert set(areas) == set(AREAS)
    assert min(areas.count(area) for area in AREAS) >= 5
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


def test_every_fault_can_be_written_and_has_tests():
    assert not [why for fault in FAULTS if (why := fault.problem())]
    assert all(fault.old != fault.new and fault.tests for fault in FAULTS)
    find_tests({test for fault in FAULTS for test in fault.tests})


def test_a_fault_is_written_once_and_into_the_copy_alone(tmp_path: Path):
    fault = Fault("two become three", "budgets", "a.py", "1 + 1", "1 + 2", ("test_faults.py::test_x",), True)
    (tmp_path / "a.py").write_text("x = 1 + 1\n")
    assert fault.write(tmp_path) == "x = 1 + 1\n"
    assert (tmp_path / "a.py").read_text() == "x = 1 + 2\n"
    assert "occurs 0 times" in fault.problem(tmp_path)
    (tmp_path / "a.py").write_text("x = 1 + 1 + 1 + 1\n")
    with pytest.raises(ListError, match="occurs 2 times"):
        fault.write(tmp_path)
    assert "no file b.py" in replace(fault, file="b.py").problem(tmp_path)


def test_tests_are_found_wherever_they_lie(tmp_path: Path):
    for folder, file, names in (("a", "test_a.py", "xy"), ("b/c", "test_b.py", "xz")):
        (tmp_path / "tests" / folder).mkdir(parents=True)
        text = "".join(f"def test_{name}():\n    pass\n" for name in names)
        (tmp_path / "tests" / folder / file).write_text(text)
    names = ["test_a.py::test_x", "test_b.py::test_x", "test_a.py::test_z"]
    paths = ["tests/a/test_a.py::test_x", "tests/b/c/test_b.py::test_x", "tests/b/c/test_b.py::test_z"]
    assert find_tests(names, tmp_path) == dict(zip(names, paths, strict=True))
    for name, count in (("test_c.py::test_x", 2), ("test_a.py::test_missing", 0)):
        with pytest.raises(ListError, match=f"{count} test files define"):
            find_tests([name], tmp_path)
