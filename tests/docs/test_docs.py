"""The documentation is executed: examples run and print what the page says, commands and options exist, links lead."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch

import sspruner
from sspruner.graph.known import installed_families
from sspruner.plugins import hookspecs
from sspruner.plugins.manager import plugin_manager
from sspruner.scoring.known import installed_scorers
from support.cli_reference import PAGE, commands, names, with_tables
from support.cli_reference import arguments as all_arguments
from support.command import run
from support.paths import ROOT
from support.zoo import FAMILIES, zoo

README, DOCS = ROOT / "README.md", sorted((ROOT / "docs").rglob("*.md"))
BESIDE = [README, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
every_page = pytest.mark.parametrize("page", [*BESIDE, *DOCS], ids=lambda p: str(p.relative_to(ROOT)))
SHORT = {"architecture.md", "calibration.md", "evaluate.md", "families.md", "methods.md"}  # take a second

COMMANDS: dict[str, Any] = dict(commands())
every_command = pytest.mark.parametrize("command", COMMANDS)

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `line` is the number of lines before its first one. joined: no prose before it."""

    language: str
    text: str
    line: int
    joined: bool


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    assert text.count("\n```") % 2 == 0, f"{page.name}: a fence is not closed"
    found, end = [], 0
    for m in FENCE.finditer(text):
        found.append(Block(m[1], m[2], text[: m.start(2)].count("\n"), joined=not text[end : m.start()].strip()))
        end = m.end()
    return found


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def section(page: Path, title: str) -> str:
    """The text under `## title`, up to the next heading of that level."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", page.read_text(encoding="utf-8"), re.M | re.S)
    assert found, f"{page.name}: no section '## {title}'"
    return found[1]


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory; afterwards the plugins, their modules and the random state are as before."""
    monkeypatch.chdir(tmp_path)
    manager = plugin_manager()
    names, modules = {name for name, _ in manager.list_name_plugin()}, set(sys.modules)
    with torch.random.fork_rng():
        yield tmp_path
    for name in {name for name, _ in manager.list_name_plugin()} - names:
        manager.unregister(name=name)
    for module in set(sys.modules) - modules:
        if module.startswith("sspruner_plugin_"):
            del sys.modules[module]


@pytest.mark.parametrize(
    "page",
    [
        p if p.name in SHORT else pytest.param(p, marks=pytest.mark.slow)
        for p in (README, *DOCS)
        if "```python" in p.read_text()
    ],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_examples_run_and_print_what_the_page_says(page: Path, sandbox: Path) -> None:
    found = blocks(page)
    namespace: dict[str, Any] = {"__name__": "docs"}
    for block, following in zip_longest(found, found[1:]):
        if block.language != "python":
            continue
        code = compile("\n" * block.line + block.text, str(page), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, namespace)
        shown = following.text if following and following.language == "text" else ""
        if printed.getvalue() or (following and following.joined and shown):
            assert printed.getvalue() == shown, f"{page.name}, line {block.line + 1}: prints something else"


@pytest.mark.slow
def test_the_first_plugin_works_as_pasted(sandbox: Path) -> None:
    (plugin,) = [b.text for b in blocks(README) if b.language == "python" and "@sspruner.hookimpl" in b.text]
    assert len(plugin.splitlines()) <= 15
    (sandbox / "my_scorer.py").write_text(plugin, encoding="utf-8")
    (sandbox / "text.txt").write_text(prose(README), encoding="utf-8")  # quicker than text sampled from the model
    options = "--samples 2 --seq-len 32 --calibration text.txt"
    result = run(*shlex.split(f"prune --plugin my_scorer.py --scorer mine {options}"))
    assert result.exit_code == 0, result.output
    assert "mine on axis state" in result.output


def test_every_hook_has_a_heading_with_its_signature() -> None:
    hooks = {name: hook for name, hook in vars(hookspecs).items() if name.startswith("sspruner_")}
    headings = set(re.findall(r"^### `(.*)`$", (ROOT / "docs/plugins.md").read_text(encoding="utf-8"), re.M))
    assert headings == {f"{name}{inspect.signature(hook)}".replace("'", "") for name, hook in hooks.items()}


@cache
def options(command: str) -> dict[str, Any]:
    """`--name` -> argument."""
    return {name: argument for argument in all_arguments(COMMANDS[command]) for name in names(argument)}


@cache
def places_of(command: str) -> list[Any]:
    """The arguments without a name."""
    return [argument for argument in all_arguments(COMMANDS[command]) if not names(argument)]


def test_every_command_has_a_section() -> None:
    titles = re.findall(r"^## sspruner (.*)$", (ROOT / "docs/cli.md").read_text(encoding="utf-8"), re.M)
    assert sorted(titles) == sorted(COMMANDS)


@every_command
def test_every_command_has_its_table_of_options(command: str) -> None:
    text = section(ROOT / "docs/cli.md", f"sspruner {command}")
    assert f"<!-- options of {command} -->\n" in text
    prose = re.sub(r"<!-- options of .*?<!-- end -->", "", text, flags=re.DOTALL)  # a help may name another command's
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", prose)) <= set(options(command)), "an option that it has not"


@pytest.mark.slow
def test_tables_of_options_are_those_of_the_command_line() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert with_tables(text) == text, "write them anew: python tests/support/cli_reference.py"


@every_command
def test_every_command_has_an_example(command: str) -> None:
    assert f"\nsspruner {command}" in section(ROOT / "docs/cli.md", f"sspruner {command}")


@pytest.mark.slow
@every_page
def test_command_lines_parse(page: Path) -> None:
    for block in blocks(page):
        if block.language != "bash":
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words[:1] == ["sspruner"]:
                check_command_line(words[1:], f"{page.name}: {line}")


def check_command_line(words: list[str], where: str) -> None:
    """A command of ours that exists, with options that exist and have their values, and few enough arguments."""
    if words in (["--help"], ["--version"]):
        return
    count = 1 if words[0] in COMMANDS else 2
    command, rest = " ".join(words[:count]), words[count:]
    assert command in COMMANDS, where
    known = options(command) | {"--help": None}
    given, arguments = set(), []
    while rest and rest[0] not in ("|", ">", "&&", ";"):
        word = rest.pop(0)
        if not word.startswith("--"):
            arguments.append(word)
            continue
        assert word in known, f"{where}: no option {word}"
        given.add(word)
        if known[word] is not None and known[word].hint is not bool:
            assert rest, f"{where}: {word} has no value"
            rest.pop(0)
    places = places_of(command)
    assert len(arguments) <= len(places) or any("..." in str(place.hint) for place in places), where
    required = {name for name, p in options(command).items() if p.required}
    assert required <= given or "--help" in given, f"{where}: needs {required}"


@pytest.mark.parametrize("name", sspruner.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    assert any(re.search(rf"\bsspruner\.{name}\b", page.read_text(encoding="utf-8")) for page in DOCS)


@every_page
def test_names_and_files_that_a_page_mentions_exist(page: Path) -> None:
    for span in re.findall(r"`([^`\n]+)`", prose(page)):
        if match := re.match(r"sspruner(?:_plugins)?(?:\.\w+)+", span):
            resolve(match[0])
        elif re.fullmatch(r"[\w./-]+/[\w.-]+\.py", span):
            places = (ROOT, ROOT / "sspruner", page.parent)
            assert any((place / span).is_file() for place in places), f"{page.name}: {span}"


def resolve(dotted: str) -> Any:
    """The object or module of a dotted name; fails if there is none."""
    found: Any = importlib.import_module(dotted.split(".")[0])
    for i, part in enumerate(dotted.split(".")[1:], start=1):
        if not hasattr(found, part):
            importlib.import_module(".".join(dotted.split(".")[: i + 1]))
        found = getattr(found, part)
    return found


@every_page
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", prose(page)):
        if "://" in target:
            continue
        file = page.parent / target if target else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", prose(file), re.M)
            slugs = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor[1:] in slugs, f"{page.name}: {target}{anchor}"


def test_every_scorer_has_a_page() -> None:
    linked = set(re.findall(r"\]\((scorers/[\w-]+\.md)\)", section(ROOT / "docs/scorers.md", "The scorers that ship")))
    assert linked == {f"scorers/{page.name}" for page in DOCS if page.parent.name == "scorers"}


def test_every_scorer_page_says_what_it_costs_and_when_to_use_it() -> None:
    for page in (page for page in DOCS if page.parent.name == "scorers"):
        text = page.read_text(encoding="utf-8")
        for part in (
            "\n| axes |",
            "\n| needs |",
            "\n| cost |",
            "\n**When to use it.**",
            "\n**When it loses.**",
            "\n```text\n",
        ):
            assert part in text, f"{page.name}: {part.strip()}"


def test_the_architecture_lists_every_module_and_every_contract() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    packages = [p.parent for p in (ROOT / "sspruner").glob("*/__init__.py")]
    assert packages
    for package in packages:
        assert f"`sspruner/{package.name}`" in text, package.name
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for contract in pyproject["tool"]["importlinter"]["contracts"]:
        assert f"\n- {contract['name']}" in text, contract["name"]


def table(page: str, title: str) -> list[list[str]]:
    """The cells of the first table under `## title`, without its head."""
    found = re.search(r"(?:^\|.*\|\n)+", section(ROOT / page, title), re.M)
    assert found, f"{page}: no table under '## {title}'"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[0].splitlines()[2:]]


def test_the_graph_lists_every_axis() -> None:
    assert {row[0].strip("`") for row in table("docs/graph.md", "Axes")} == sspruner.AXES


def test_the_families_are_listed_with_their_mixers_and_axes() -> None:
    rows = {row[0].strip("`"): row[1:] for row in table("docs/families.md", "What ships")}
    families = {name: f for name, f in installed_families().items() if type(f).__module__.startswith("sspruner.")}
    assert {name: mixer.strip("`") for name, (mixer, _) in rows.items()} == {
        name: f.mixer_class for name, f in families.items()
    }
    for name in FAMILIES:
        assert set(re.findall(r"`(\w+)`", rows[name][1])) == set(sspruner.trace(zoo(name)).axes), name


def test_the_scorers_are_listed_with_their_axes_and_needs() -> None:
    listed = table("docs/scorers.md", "The scorers that ship")
    rows = {name: row[1:] for row in listed for name in re.findall("`(.*?)`", row[0])}
    shipped = {n: cls for n, (cls, _) in installed_scorers().items() if cls.__module__.startswith("sspruner_plugins.")}
    assert set(rows) == set(shipped)
    for name, (axes, needs, _) in rows.items():
        named = set(re.findall(r"`(\w+)`", axes))
        every = sspruner.AXES | sspruner.ELEMENT_AXES
        assert (every - named if axes.startswith("all") else named) == shipped[name].axes, name
        assert needs == shipped[name].needs, name
