"""Test modules share code through tests/support and fixtures: none imports another."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from support.paths import TESTS

FOLDERS = {path.name for path in TESTS.iterdir() if path.is_dir()} - {"support"}
MODULES = sorted(TESTS.rglob("*.py"))


def imported(source: str) -> set[str]:
    """The full names of all modules that a module's code imports, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module or ''}.{alias.name}" for alias in node.names} if not node.level else {"."}
    return names


def forbidden(source: str) -> set[str]:
    """Imports of test modules and conftests, relative ones included."""
    return {
        name
        for name in imported(source)
        if name == "." or name.split(".")[0] in FOLDERS | {"tests", "conftest"} or "test_" in name.partition(".")[0]
    }


@pytest.mark.parametrize(
    ("source", "refused"),
    [
        ("from test_scorers import calibrated", True),
        ("def f():\n    import unit.graph.test_zoo", True),
        ("from . import test_zoo", True),
        ("from tests.conftest import DATA", True),
        ("from support.tiny import test_model", False),
        ("import pytest", False),
    ],
)
def test_what_is_refused(source: str, refused: bool) -> None:
    assert bool(forbidden(source)) == refused


@pytest.mark.slow
def test_no_test_module_imports_another() -> None:
    assert len(MODULES) > 100
    found = {str(path.relative_to(TESTS)): forbidden(path.read_text(encoding="utf-8")) for path in MODULES}
    assert {path: names for path, names in found.items() if names} == {}


def test_every_test_module_has_a_folder() -> None:
    """Files lie in unit/<package>, laws, cli, processes or docs; only conftest.py is in tests/ itself."""
    assert [path for path in TESTS.glob("*.py") if path != Path(TESTS / "conftest.py")] == []
