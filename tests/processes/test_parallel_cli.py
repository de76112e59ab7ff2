"""`sspruner` under torchrun: one result, one output, and one line where it fails."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import sspruner
from support.command import run as cli
from support.tiny import tiny_model

SMALL = ["--samples", "5", "--seq-len", "12", "--device", "cpu", "--axis", "state"]

PLUGIN = """
import os
import sspruner
from sspruner_plugins.ghost import Ghost

class Fails(Ghost):
    name = "fails"

    def observe(self, view):
        if os.environ.get("RANK") == "1":
            {what}
        super().observe(view)

@sspruner.hookimpl
def sspruner_scorers():
    return [Fails]
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    sspruner.save(tiny_model(), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def plugin(tmp_path: Path) -> Callable[[str], list[str]]:
    """Options that take a scorer which does something in the second process."""

    def write(what: str) -> list[str]:
        (tmp_path / "fails.py").write_text(PLUGIN.format(what=what), encoding="utf-8")
        return ["--plugin", str(tmp_path / "fails.py"), "--scorer", "fails"]

    return write


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, "-m", "sspruner", *arguments], capture_output=True, text=True, timeout=300, env=os.environ
    )


def two(*arguments: str) -> list[tuple[int, str, str]]:
    """Two processes as torchrun starts them, without its own words: the exit code, output and errors of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "sspruner", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300) for process in started]
    return [(process.returncode, *words) for process, words in zip(started, said, strict=True)]


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("sspruner: ")]


@pytest.mark.slow
def test_torchrun_prunes_like_one_process(model: Path, tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    done = torchrun("prune", str(model), *SMALL, "--out", str(shared), "--json", str(tmp_path / "report.json"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("saved to") == 1
    assert not lines(done.stderr)
    cli("prune", str(model), *SMALL, "--out", str(alone))
    a, b = (sspruner.Plan.load(folder / "plan.json") for folder in (alone, shared))
    assert a.groups == b.groups
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["calibration"]["sequences"] == 5


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_failure_of_one_is_that_of_all(model: Path, tmp_path: Path, plugin: Callable[[str], list[str]]) -> None:
    done = torchrun(
        "prune", str(model), *SMALL, *plugin("raise ValueError('broken here')"), "--out", str(tmp_path / "out")
    )
    assert done.returncode
    (line,) = lines(done.stderr)
    assert "scorer 'fails' on backbone.layers.0.mixer:state failed: ValueError: broken here" in line
    assert "exitcode  : 2" in done.stderr
    assert not (tmp_path / "out").exists()
    assert not done.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "code", "message"),
    [
        pytest.param(
            "raise sspruner.InputError('not on this text')",
            2,
            "scorer 'fails' on .*: not on this text",
            marks=pytest.mark.exhaustive,
        ),
        ("os.kill(os.getpid(), 9)", 1, "another process of this run is gone"),
    ],
)
def test_one_line_of_all(what: str, code: int, message: str, model: Path, plugin: Callable[[str], list[str]]) -> None:
    found = two("score", str(model), *SMALL, *plugin(what), "--out", str(model / "scores.safetensors"))
    (line,) = lines(found[0][2] + found[1][2])
    assert found[0][0] == code
    assert found[1][0] in (code, -9)
    assert re.search(message, line)
    assert "Traceback" not in found[0][2] + found[1][2]


@pytest.mark.ci_cover(most=1)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "--no-such-option"], "--no-such-option"),
        (["inspect"], "this command runs in one process: start it without torchrun"),
        (["train", "distil", "nowhere"], "--text is missing"),
    ],
)
def test_what_is_wrong_in_all_is_said_once(arguments: list[str], message: str) -> None:
    found = two(*arguments)
    (line,) = lines(found[0][2] + found[1][2])
    assert message in line
    assert [code for code, _, _ in found] == [2, 2]
    assert not any(out.strip() for _, out, _ in found)


@pytest.mark.slow
def test_processes_that_cannot_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """RANK and WORLD_SIZE of something else than torchrun."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    found = cli("score")
    assert found.exit_code == 2
    assert "cannot meet" in found.stderr
