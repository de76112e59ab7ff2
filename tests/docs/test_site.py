"""Site and front page, without mkdocs: navigation, signatures, notebooks, metadata, what errors say to install."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import sspruner
from sspruner.scoring.known import installed_scorers
from support.command import run
from support.notebooks import NOTEBOOKS, code_cells, printed, read, shown
from support.paths import ROOT

DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def entries(nav: Any) -> Iterator[str]:
    """Yield the pages of a navigation, at any depth."""
    if isinstance(nav, str):
        yield nav
    for inner in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from entries(inner)


def test_the_navigation_has_every_page_once_and_no_other() -> None:
    nav = list(entries(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    assert sorted(nav) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_pages_link_inside_the_site_alone() -> None:
    """A site has no files above docs/; GitHub has, so that only the site would show the dead link."""
    for page in DOCS.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#\s:]+)(?:#[^)\s]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).resolve().is_relative_to(DOCS), f"{page.relative_to(ROOT)}: {target}"


def test_every_public_name_has_its_signature_on_a_page() -> None:
    shown = re.findall(r"^::: sspruner\.(\w+)$", "".join(p.read_text() for p in (DOCS / "api").glob("*.md")), re.M)
    without = {"AXES", "ELEMENT_AXES", "Choose"}  # no docstring: a table has them
    assert sorted(shown) == sorted(set(sspruner.__all__) - without)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 200
    assert re.search(r"<!-- demo: begin -->\n```text\n.*?```\n<!-- demo: end -->", README, re.DOTALL)


def test_the_readme_counts_the_scorers_that_ship() -> None:
    shipped = [cls for cls, _ in installed_scorers().values() if cls.__module__.startswith("sspruner_plugins.")]
    assert f" {len(shipped)} ship\n" in README


@pytest.mark.slow
def test_the_demo_prints_what_the_readme_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes, proof and prompt to the letter. Perplexities and seconds are the machine's."""
    found = re.search(r"^demo:.*\n\t\$\(BIN\)/sspruner (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    shown = re.search(r"<!-- demo: begin -->\n```text\n(.*?)```", README, re.DOTALL)
    assert found
    assert shown
    monkeypatch.chdir(tmp_path)
    done = run(*shlex.split(found[1]))
    assert done.exit_code == 0, done.stderr
    same = re.compile(
        r"^(mamba2-books|│ (state|parameters|weight bytes)|proof|calibration|\s*prompt|saved|load|next|  \w+ )"
    )
    printed, expected = (
        [" ".join(line.split()) for line in text.splitlines() if same.match(line)] for text in (done.stdout, shown[1])
    )
    assert len(expected) > 12
    assert [line.partition(" (limit")[0].partition(" to 0.0e")[0] for line in printed] == [
        line.partition(" (limit")[0].partition(" to 0.0e")[0] for line in expected
    ]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_prints_what_it_shows(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = read(notebook)
    with torch.random.fork_rng():
        texts = printed(found)
    assert texts == [shown(cell) for cell in code_cells(found)], "write it anew: python tests/support/notebooks.py"


def test_there_are_two_notebooks_that_pages_link_to() -> None:
    pages = README + "".join(page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md"))
    assert sorted(DOCS.rglob("*.ipynb")) == NOTEBOOKS
    assert len(NOTEBOOKS) == 2
    for notebook in NOTEBOOKS:
        assert notebook.name in pages
        assert any(shown(cell) for cell in code_cells(read(notebook)))


def test_what_is_said_to_install_is_an_extra_that_works_from_a_clone() -> None:
    """`sspruner[x]` would ask a registry; `.[x]` is the clone, and PATH/sspruner[x] the clone from elsewhere."""
    pages = [page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md") if "examples" not in page.parts]
    said = re.findall(r"pip install '([^'\[]*)\[(\w+)\]'", README + "".join(pages))
    assert {place for place, _ in said} == {".", "path/to/sspruner"}
    code = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "sspruner").rglob("*.py"))
    named = re.findall(r"""\binstall\(['"](\w+)['"]\)""", code)
    assert {"eval", "gguf", "report", "testing", "train"} <= set(named)
    assert {*named, *(extra for _, extra in said)} <= set(PROJECT["optional-dependencies"])


def test_metadata_is_complete() -> None:
    needed = {"description", "readme", "license", "license-files", "keywords", "classifiers", "urls", "authors"}
    assert needed <= set(PROJECT)
    assert PROJECT["readme"] == "README.md"
    classifiers = " ".join(PROJECT["classifiers"])
    assert all(part in classifiers for part in ("Development Status", "Linux", "3.11", "Typing :: Typed"))


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == sspruner.__version__
    assert citation["license"] == PROJECT["license"]
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
