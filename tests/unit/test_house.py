"""The house: what import-linter's contracts cannot say."""

from __future__ import annotations

import ast
from pathlib import Path

import sspruner

PACKAGE = Path(sspruner.__file__).parent
TOP = {"cli", "doctor.py", "testing", "__main__.py"}  # what stands above the engine may use what users use


def engine_modules() -> list[Path]:
    return [
        p for p in sorted(PACKAGE.rglob("*.py")) if p.relative_to(PACKAGE).parts[0] not in TOP and p.parent != PACKAGE
    ]


def imports_of_the_facade(tree: ast.AST) -> list[str]:
    """The names that a module takes from `sspruner` itself, anywhere in it."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name == "sspruner"]
        if isinstance(node, ast.ImportFrom) and node.module == "sspruner" and not node.level:
            packages = {p.name.removesuffix(".py") for p in PACKAGE.iterdir()}
            found += [alias.name for alias in node.names if alias.name not in packages]
    return found


def test_no_engine_module_imports_the_facade():
    assert len(engine_modules()) > 150
    guilty = {
        str(path): names for path in engine_modules() if (names := imports_of_the_facade(ast.parse(path.read_text())))
    }
    assert not guilty


def test_what_counts_as_the_facade():
    assert imports_of_the_facade(ast.parse("def f():\n    import sspruner")) == ["sspruner"]
    assert imports_of_the_facade(ast.parse("from sspruner import prune, errors")) == ["prune"]


def test_every_public_name_is_where_the_list_says():
    for name in sspruner.__all__:
        assert getattr(sspruner, name) is not None
    assert sspruner.__all__ == sorted(sspruner.__all__)


def test_a_package_bears_no_name_of_a_public_function():
    packages = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert not packages & set(sspruner.__all__)
