"""The list of flags is frozen; every command has a help in panels with two examples, and no text is written twice."""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from pathlib import Path

import pytest

import sspruner
from support.cli_reference import FLAGS, LINKS, arguments, commands, flags, names
from support.command import done, run
from support.paths import ROOT

COMMANDS = dict(commands())


def test_flags_are_those_of_the_list() -> None:
    assert flags() == FLAGS.read_text(encoding="utf-8"), (
        "flags or defaults have changed, which breaks command lines of users; if it is meant: "
        "python tests/support/cli_reference.py"
    )


@pytest.mark.cover(most=5)
@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str) -> None:
    says = done(*command.split(), "--help").stdout
    panels = re.findall(r"^╭─ (.*?) ─+╮$", says, re.M)
    assert len(set(panels)) == len(panels)
    assert "Parameters" not in panels, "an option without a panel"
    assert "Commands" not in panels
    assert not re.search(r"--no-(?!cache)|--empty-|\(\)|{}|MAPPING|\bSTR\b|default: (None|False)", says)
    words = " ".join(says.replace("│", " ").split())
    for argument in arguments(COMMANDS[command]):
        assert argument.parameter.help, f"{argument.name}: no help"
        assert " ".join(argument.parameter.help.split()) in words
        assert argument.name in words


def test_panels_of_the_main_job() -> None:
    panels = re.findall(r"^╭─ (.*?) ─+╮$", done("prune", "--help").stdout, re.M)
    assert panels == [
        "Model", "What to remove", "How much", "Method", "Calibration", "Target", "Machine", "Large models", "Output",
    ]  # fmt: skip


@pytest.mark.cover(most=5)
@pytest.mark.parametrize("command", COMMANDS)
def test_examples_parse(command: str) -> None:
    examples = done(*command.split(), "--help").stdout.partition("Examples:\n")[2].splitlines()
    assert len(examples) >= 2
    for line in examples:
        assert len(line) <= 80, "it would be wrapped in a narrow terminal"
        words = shlex.split(line)
        assert words[: 1 + len(command.split())] == ["sspruner", *command.split()]
        COMMANDS[command].parse_args(words[1 + len(command.split()) :], exit_on_error=False, print_error=False)


@pytest.mark.slow
def test_no_text_of_an_option_is_written_twice() -> None:
    """Neither in the help of two options of the same meaning nor in the source."""
    source = "\n".join(
        " ".join(path.read_text(encoding="utf-8").split())
        for folder in ("cli", "recipes")
        for path in sorted((ROOT / "sspruner" / folder).glob("*.py"))
    )
    texts = defaultdict(set)
    for name, command in COMMANDS.items():
        for argument in arguments(command):
            texts[" ".join(argument.parameter.help.split())].add((names(argument) or [argument.name])[0])
            assert name
    for text, owners in texts.items():
        assert len(owners) == 1, f"{sorted(owners)} have one text"
        assert source.count(text) <= 1, text


@pytest.mark.slow
def test_options_with_a_link_exist() -> None:
    assert set(LINKS) <= {name for command in COMMANDS.values() for a in arguments(command) for name in names(a)}


def test_version() -> None:
    assert done("--version").stdout == f"sspruner {sspruner.__version__}\n"


def test_alone_it_prints_its_help() -> None:
    assert done().stdout == done("--help").stdout
    assert done().stdout.startswith("Usage: sspruner COMMAND")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("nosuch", "no such command: nosuch; known: apply, "),
        ("prnue", "no such command: prnue; did you mean 'prune'? (see `sspruner --help`)"),
        ("--nosuch", "no such option: --nosuch (see `sspruner --help`)"),
        (
            "prune --spasity=0.5",
            "no such option: --spasity=0.5; did you mean '--sparsity'? (see `sspruner prune --help`)",
        ),
        ("prune --zzz", "no such option: --zzz (see `sspruner prune --help`)"),
        ("prune --no-offload", "no such option: --no-offload; did you mean '--offload'?"),
        ("prune a b", "unexpected argument 'b' (see `sspruner prune --help`)"),
        ("prune --keep", "--keep needs a value (see `sspruner prune --help`)"),
        ("prune --keep 2.5", "--keep: '2.5' is not a whole number"),
        ("prune --sparsity half", "--sparsity: 'half' is not a number"),
        ("apply", "--out is missing (see `sspruner apply --help`)"),
        ("report", "DIR is missing (see `sspruner report --help`)"),
    ],
)
def test_wrong_usage_is_one_plain_line(words: str, says: str) -> None:
    result = run(*words.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("sspruner: ")
    assert result.stderr.count("\n") == 1
    assert says in result.stderr


def test_what_is_given_twice_counts_once_but_for_lists(tmp_path: Path) -> None:
    says = run("prune", "--keep", "3", "--keep", "0").stderr
    assert "keep 0: must be at least 1" in says
    _, bound, _ = COMMANDS["prune"].parse_args(["--ratio", "a=0.1", "--ratio", "b=0.2,c=0.3", "--ratio", "a=0.4"])
    assert bound.kwargs["recipe"].budget.ratios == {"a": 0.4, "b": 0.2, "c": 0.3}
    _, bound, _ = COMMANDS["prune"].parse_args(["--rows", "B", "--rows", "C", "--plugin", "x.py", "--plugin", "y.py"])
    assert bound.kwargs["recipe"].elements.rows == ("B", "C")
    assert bound.kwargs["machine"].plugin == (Path("x.py"), Path("y.py"))
